//! Where text goes: results to standard output, hints and errors to standard error, and with
//! `--json` one versioned document to standard output, errors included.

use std::io::{IsTerminal, Write};

use farshore_extent::{Code, Problem, WallTime};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::args::Global;
use crate::exit::Failure;
use crate::units;

/// The two streams and how to write to them.
#[derive(Debug, Clone)]
pub struct Out {
    /// One JSON document instead of text.
    pub json: bool,
    /// Nothing but results and errors.
    pub quiet: bool,
    /// Cause chains and details.
    pub verbose: bool,
    colour_out: bool,
    colour_err: bool,
}

/// What a colour says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// As it should be.
    Good,
    /// Needs a look.
    Warn,
    /// Needs a person.
    Bad,
    /// Less important.
    Faint,
    /// A heading.
    Strong,
}

impl Tone {
    const fn code(self) -> &'static str {
        match self {
            Self::Good => "32",
            Self::Warn => "33",
            Self::Bad => "1;31",
            Self::Faint => "2",
            Self::Strong => "1",
        }
    }
}

impl Out {
    /// As the global options say; colours only on a terminal and without NO_COLOR.
    pub fn new(global: &Global) -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
            && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        Self {
            json: global.json,
            quiet: global.quiet,
            verbose: global.verbose > 0,
            colour_out: wanted && std::io::stdout().is_terminal(),
            colour_err: wanted && std::io::stderr().is_terminal(),
        }
    }

    /// Whether results go to a terminal.
    pub fn on_terminal() -> bool {
        std::io::stdout().is_terminal()
    }

    /// Text for standard output, coloured when it is a terminal.
    pub fn paint(&self, tone: Tone, text: &str) -> String {
        paint(self.colour_out, tone, text)
    }

    /// A result: text as it is.
    pub fn text(&self, text: &str) {
        let mut stdout = std::io::stdout().lock();
        let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        if written.is_err() {
            // The reader (`head`, a pager) has what it wanted.
            std::process::exit(0);
        }
    }

    /// A result: one line.
    pub fn line(&self, line: impl AsRef<str>) {
        self.text(&format!("{}\n", line.as_ref()));
    }

    /// What may help next; not part of the result.
    pub fn hint(&self, line: impl AsRef<str>) {
        if !self.quiet && !self.json {
            let text = paint(self.colour_err, Tone::Faint, line.as_ref());
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// A result as a versioned document.
    pub fn document<T: Serialize>(&self, schema: &str, key: &str, value: &T) {
        self.text(&format!("{}\n", render(&document(schema, key, value))));
    }

    /// An error, in the one shape for people or as a document.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            self.text(&format!("{}\n", render(&failure_document(failure))));
            return;
        }
        let mut stderr = std::io::stderr().lock();
        for problem in failure.problems() {
            let _ = stderr.write_all(problem_text(problem, self.colour_err).as_bytes());
        }
        if self.verbose {
            for cause in &failure.chain {
                let _ = writeln!(stderr, "  cause  {cause}");
            }
        }
    }
}

fn paint(colour: bool, tone: Tone, text: &str) -> String {
    if colour { format!("\x1b[{}m{text}\x1b[0m", tone.code()) } else { text.to_owned() }
}

/// The four lines of an error.
pub fn problem_text(problem: &Problem, colour: bool) -> String {
    let Problem { code, what, risk, why, next } = problem;
    let head = paint(colour, Tone::Bad, &format!("error {code}:"));
    let explain = format!("(farshore explain {code})");
    let next = if next.is_empty() { explain } else { format!("{next} {explain}") };
    let mut text = format!("{head} {what}\n");
    for (label, body) in [("risk", risk), ("why", why), ("next", &next)] {
        if !body.is_empty() {
            text.push_str(&format!("  {label:<6} {body}\n"));
        }
    }
    text
}

/// `{"schema": SCHEMA, KEY: value}` with codes and instants as text.
pub fn document<T: Serialize>(schema: &str, key: &str, value: &T) -> Value {
    let mut document = Map::new();
    document.insert("schema".into(), schema.into());
    // Plain data of ours always serialises; null would show a defect, not hide one.
    document.insert(key.into(), serde_json::to_value(value).unwrap_or(Value::Null));
    let mut document = Value::Object(document);
    readable(&mut document);
    document
}

/// The document of an error.
pub fn failure_document(failure: &Failure) -> Value {
    let (first, more) = failure.problems().split_at(1.min(failure.problems().len()));
    let mut document = json!({
        "schema": "farshore.error/1",
        "exit": failure.exit().number(),
        "error": first.first(),
        "more": more,
        "causes": failure.chain,
    });
    readable(&mut document);
    document
}

fn render(document: &Value) -> String {
    serde_json::to_string_pretty(document).unwrap_or_else(|_| "{}".to_owned())
}

/// Keys that hold an instant in nanoseconds inside the daemons' messages.
const INSTANTS: [&str; 12] = [
    "time",
    "now",
    "opened",
    "begun",
    "ended",
    "fenced_since",
    "enrolled",
    "newest_point",
    "oldest_point",
    "last_drill",
    "last_contact",
    "journaled_time",
];

/// Numbers that mean an instant or a code become the text people know.
fn readable(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(readable),
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                if INSTANTS.contains(&key.as_str()) {
                    if let Some(nanos) = value.as_i64() {
                        *value = units::rfc3339(WallTime::from_nanos(nanos)).into();
                    }
                } else if key == "code" {
                    if let Some(code) = value.as_u64().and_then(|n| u16::try_from(n).ok()) {
                        *value =
                            if code == 0 { Value::Null } else { Code(code).to_string().into() };
                    }
                } else {
                    readable(value);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Columns padded to their widest cell, two spaces apart; nothing behind the last.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |i: usize| rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|i| width(i).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounted() -> Problem {
        Problem::harmless(
            4012,
            "cannot open /dev/vdb for protection: it is mounted on /var/lib/postgresql",
            "writes that bypass /dev/farshore/pgdata would be missing on the replica",
            "stop the application, unmount, run the same command again",
        )
    }

    #[test]
    fn an_error_has_the_shape_of_the_design() {
        let expected = "\
error FS-4012: cannot open /dev/vdb for protection: it is mounted on /var/lib/postgresql
  risk   none, nothing was changed
  why    writes that bypass /dev/farshore/pgdata would be missing on the replica
  next   stop the application, unmount, run the same command again (farshore explain FS-4012)
";
        assert_eq!(problem_text(&mounted(), false), expected);
    }

    #[test]
    fn an_error_as_json_is_a_contract() {
        let document = failure_document(&Failure::from(mounted()));
        crate::status::golden::same("error.json", &document);
    }

    #[test]
    fn columns_line_up() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        assert_eq!(table(&[row(["a", "b"]), row(["ccc", ""])]), "a    b\nccc\n");
    }
}
