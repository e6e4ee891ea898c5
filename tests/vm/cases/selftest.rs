//! The harness itself: what must not pass for success does not.

use std::time::Duration;

use crate::harness::{run, wait_for};
use crate::runner::{Lab, STABLE};
use crate::{Case, Scenario, case_list};

pub const SCENARIO: Scenario = Scenario {
    name: "selftest::a_failed_a_hung_and_a_panicked_step_are_failures",
    kernel: STABLE,
    soak: false,
    run: a_failed_a_hung_and_a_panicked_step_are_failures,
};

pub const STEPS: &[Case] = case_list![fail, hang, oops];

const LIMIT: Duration = Duration::from_secs(60);

fn a_failed_a_hung_and_a_panicked_step_are_failures(lab: &Lab) -> Result<(), String> {
    let mut machine = lab.boot("machine", &[])?;
    let mut expect = |step: &str, limit: Duration, told: &str| match machine.run_case(step, limit) {
        Ok(_) => Err(format!("{step} passed")),
        Err(why) if why.contains(told) => Ok(()),
        Err(why) => Err(format!("{step} failed for another reason than {told:?}:\n{why}")),
    };
    expect("selftest::nothing_of_that_name", LIMIT, "there is no case")?;
    expect("selftest::fail", LIMIT, "this step fails")?;
    expect("selftest::hang", Duration::from_secs(3), "its time was over")?;
    expect("selftest::oops", LIMIT, "the machine died")
}

fn fail() {
    panic!("this step fails");
}

fn hang() {
    wait_for("what never comes", 10 * LIMIT, || None)
}

/// The kernel panics; QEMU then ends with exit code 0.
fn oops() {
    run("sh", &["-c", "echo c > /proc/sysrq-trigger"]);
}
