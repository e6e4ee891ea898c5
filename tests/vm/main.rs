//! Tests on a real kernel in virtual machines; see README.md beside this file. On the host this
//! program boots the machines; inside of them it is started again for each case.
#![allow(missing_docs)] // no library

#[path = "../harness/mod.rs"]
mod harness;

mod cases;
mod guest;
mod image;
mod machine;
mod mapper;
mod runner;
mod volume;

use std::time::Duration;

use image::Disk;

/// One test, or one step of a test; runs inside of a machine and panics if something is wrong.
pub struct Case {
    pub name: &'static str,
    pub run: fn(),
}

/// The functions with these names as cases.
macro_rules! case_list {
    ($($name:ident),* $(,)?) => { &[$(crate::Case { name: stringify!($name), run: $name }),*] };
}
pub(crate) use case_list;

/// Cases that share one boot and run in it one after the other.
pub struct Group {
    /// The module it stands in: a case is called GROUP::FUNCTION.
    pub name: &'static str,
    /// What tools/vm-kernel is asked for.
    pub kernel: &'static str,
    /// Only with `--include-ignored`.
    pub soak: bool,
    pub disks: &'static [Disk],
    /// More than one are slower still: they take turns.
    pub cpus: u8,
    /// For each case; TCG is 5 to 10 times slower than the machine it runs on.
    pub limit: Duration,
    pub cases: &'static [Case],
}

impl Group {
    /// The kernel of the stable release, no disk but the scratch disk, four minutes for each case.
    pub const DEFAULT: Self = Self {
        name: "",
        kernel: runner::STABLE,
        soak: false,
        disks: &[],
        cpus: 1,
        limit: Duration::from_secs(240),
        cases: &[],
    };
}

/// A test that needs several boots or machines: runs on the host and has the machines do steps.
pub struct Scenario {
    /// MODULE::FUNCTION.
    pub name: &'static str,
    pub kernel: &'static str,
    pub soak: bool,
    pub run: fn(&runner::Lab) -> Result<(), String>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [flag, name] if flag == "--in-guest" => runner::in_guest(name),
        _ => std::process::exit(runner::on_host(&arguments)),
    }
}
