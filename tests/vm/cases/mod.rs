//! Every test of this program. A new group is a module here and a line in each list it belongs to.

mod cable;
mod demo;
mod device;
mod differential;
mod files;
mod grow;
mod guard;
mod host_cut;
mod kernel;
mod kernel_nbd;
mod kills;
mod life;
mod origin;
#[path = "../../../benches/load/plain.rs"]
mod plain;
mod power;
mod ratios;
mod readme;
mod selftest;
mod slow_disk;
mod source_cut;
mod store_disk;
mod systemd;
mod torture;
mod ublk_front;
mod verify;
mod views;

use crate::{Case, Group, Scenario};

/// One boot each.
pub const GROUPS: &[Group] = &[
    kernel::GROUP,
    kernel::NEWEST_GROUP,
    kernel_nbd::GROUP,
    verify::GROUP,
    files::GROUP,
    grow::GROUP,
    grow::NEWEST_GROUP,
    ublk_front::GROUP,
    ublk_front::NEWEST_GROUP,
    kills::GROUP,
    device::GROUP,
    kills::TWO_QUEUES_GROUP,
    life::UBLK_GROUP,
    life::NBD_GROUP,
    slow_disk::GROUP,
    store_disk::GROUP,
    torture::GROUP,
    guard::GROUP,
    origin::GROUP,
    views::GROUP,
    differential::GROUP,
    differential::OTHER_SERVER_GROUP,
    demo::GROUP,
    ratios::GROUP,
];

/// Several boots or machines each.
pub const SCENARIOS: &[Scenario] = &[
    cable::SCENARIO,
    host_cut::SCENARIO,
    power::SCENARIO,
    readme::SCENARIO,
    selftest::SCENARIO,
    source_cut::SCENARIO,
    systemd::SCENARIO,
    torture::SCENARIO,
];

/// Steps that scenarios have the machines do: module and functions.
pub const STEPS: &[(&str, &[Case])] = &[
    ("cable", cable::STEPS),
    ("host_cut", host_cut::STEPS),
    ("kernel_nbd", kernel_nbd::STEPS),
    ("power", power::STEPS),
    ("selftest", selftest::STEPS),
    ("source_cut", source_cut::STEPS),
    ("systemd", systemd::STEPS),
    ("torture", torture::STEPS),
    ("ublk_front", ublk_front::STEPS),
];
