//! Two machines joined by a cable reach each other, also after one of them has lost its power.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use crate::harness::wait_for;
use crate::runner::{Lab, STABLE};
use crate::{Case, Scenario, case_list};

pub const SCENARIO: Scenario = Scenario {
    name: "cable::two_machines_reach_each_other_also_after_a_power_cut",
    kernel: STABLE,
    soak: false,
    run: two_machines_reach_each_other_also_after_a_power_cut,
};

pub const STEPS: &[Case] = case_list![listen, greet];

const LIMIT: Duration = Duration::from_secs(120);
const PORT: u16 = 9443;

fn two_machines_reach_each_other_also_after_a_power_cut(lab: &Lab) -> Result<(), String> {
    let mut target = lab.boot_joined("target", &[], 0, "192.0.2.10/24")?;
    let mut source = lab.boot_joined("source", &[], 1, "192.0.2.1/24")?;
    for last in [false, true] {
        let listening = target.start_case("cable::listen", LIMIT);
        source.run_case("cable::greet", LIMIT)?;
        target.finish(&listening)?;
        if !last {
            source.cut();
            source = lab.boot_joined("source", &[], 1, "192.0.2.1/24")?;
        }
    }
    Ok(())
}

fn listen() {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).expect("listen");
    let (mut peer, _) = listener.accept().expect("accept");
    let mut said = String::new();
    peer.read_to_string(&mut said).expect("read");
    assert_eq!(said, "hello");
}

fn greet() {
    let mut peer =
        wait_for("the other machine", LIMIT, || TcpStream::connect(("192.0.2.10", PORT)).ok());
    peer.write_all(b"hello").expect("write");
}
