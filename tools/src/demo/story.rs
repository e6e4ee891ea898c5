//! How the demo tells what it does: numbered chapters, commands as one would type them, short
//! sentences. With `--json` the story goes to standard error, the figures to standard output.

use std::cell::Cell;
use std::io::Write;

use crate::output::{Out, Tone};

/// The teller.
pub struct Story {
    /// Where results go.
    pub out: Out,
    chapter: Cell<u32>,
}

impl Story {
    /// Nothing told yet.
    pub fn new(out: Out) -> Self {
        Self { out, chapter: Cell::new(0) }
    }

    fn line(&self, text: &str) {
        if self.out.json {
            let _ = writeln!(std::io::stderr(), "{text}");
        } else {
            self.out.line(text);
        }
    }

    /// The first line.
    pub fn title(&self, text: &str) {
        self.line(&self.out.paint(Tone::Strong, text));
    }

    /// A new chapter.
    pub fn chapter(&self, text: &str) {
        self.chapter.set(self.chapter.get() + 1);
        let head = format!("{}  {text}", self.chapter.get());
        self.line(&format!("\n{}", self.out.paint(Tone::Strong, &head)));
    }

    /// A command that is carried out.
    pub fn command(&self, line: &str) {
        self.line(&format!("   {}", self.out.paint(Tone::Faint, &format!("$ farshore {line}"))));
    }

    /// A sentence.
    pub fn say(&self, text: &str) {
        self.line(&format!("   {text}"));
    }

    /// Something that was proven.
    pub fn proven(&self, text: &str) {
        self.line(&format!("   {} {text}", self.out.paint(Tone::Good, "✓")));
    }

    /// Something violent.
    pub fn event(&self, text: &str) {
        self.line(&format!("   {} {text}", self.out.paint(Tone::Warn, "!")));
    }

    /// The verdict.
    pub fn last(&self, text: &str) {
        self.line(&format!("\n{text}"));
    }
}

/// A count with separators: `1,234,567`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn counts_have_separators() {
        assert_eq!(count(7), "7");
        assert_eq!(count(1234), "1,234");
        assert_eq!(count(123_456_789), "123,456,789");
    }
}
