//! Asking a person before something is done.

use std::io::{BufRead, IsTerminal, Write};

use farshore_extent::Problem;

use crate::args::Global;

/// Goes on with `--yes` or when the person agrees; without a terminal nobody can agree.
pub fn confirm(question: &str, global: &Global) -> Result<(), Problem> {
    if global.yes {
        return Ok(());
    }
    let declined = |why: &str| {
        Problem::harmless(
            4902,
            format!("not confirmed: {question}"),
            why,
            "run it again with --yes",
        )
    };
    if !std::io::stdin().is_terminal() {
        return Err(declined("there is no terminal to ask on"));
    }
    let _ = write!(std::io::stderr(), "{question} [y/N] ");
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    let agreed = matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes");
    if read.is_ok() && agreed { Ok(()) } else { Err(declined("the answer was not yes")) }
}
