//! The executable `farshore`: everything is in the library, so that system tests can use it.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    farshore::command_line()
}
