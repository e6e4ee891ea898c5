//! The catalogue of error codes: `docs/errors.md`, read by people and by `farshore explain`.

use std::sync::LazyLock;

use farshore_extent::{Code, Problem};
use serde::Serialize;

use crate::exit::{Exit, Failure};
use crate::output::{Out, Tone, table};

const CATALOGUE: &str = include_str!("../../docs/errors.md");

/// One code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// The code.
    pub code: Code,
    /// The cause in a few words.
    pub title: String,
    /// Why it happens and what to do.
    pub text: String,
    /// Exit code of the program when it is not the one of the code's range.
    pub exit: Option<u8>,
}

static ENTRIES: LazyLock<Vec<Entry>> = LazyLock::new(|| parse(CATALOGUE));

fn parse(catalogue: &str) -> Vec<Entry> {
    catalogue.split("\n## FS-").skip(1).filter_map(parse_entry).collect()
}

fn parse_entry(section: &str) -> Option<Entry> {
    let (head, body) = section.split_once('\n')?;
    let (number, title) = head.split_once(' ')?;
    let text = body.split("\n# ").next().unwrap_or(body).trim();
    let marked = title.trim().strip_suffix(')').and_then(|t| t.rsplit_once("(exit "));
    let (title, exit) = marked.map_or((title, None), |(title, n)| (title, n.parse().ok()));
    Some(Entry {
        code: Code(number.parse().ok()?),
        title: title.trim().to_owned(),
        text: text.to_owned(),
        exit,
    })
}

/// What is known about a code.
pub fn entry(code: Code) -> Option<&'static Entry> {
    ENTRIES.iter().find(|e| e.code == code)
}

/// `farshore explain [CODE]`.
pub fn run(code: Option<&str>, out: &Out) -> Result<Exit, Failure> {
    let Some(text) = code else {
        if out.json {
            out.document("farshore.explain/1", "codes", &*ENTRIES);
        } else {
            let row = |e: &Entry| vec![e.code.to_string(), e.title.clone()];
            out.text(&table(&ENTRIES.iter().map(row).collect::<Vec<_>>()));
        }
        return Ok(Exit::Ok);
    };
    let number = text.trim().to_ascii_uppercase();
    let number = number.strip_prefix("FS-").unwrap_or(&number).parse::<u16>();
    let entry = number.ok().and_then(|n| entry(Code(n))).ok_or_else(|| {
        Problem::harmless(
            1907,
            format!("`{text}` is not a known error code"),
            "codes look like FS-4012, and each has an entry",
            "`farshore explain` lists all",
        )
    })?;
    if out.json {
        out.document("farshore.explain/1", "codes", &[entry]);
    } else {
        let head = format!("{}  {}", entry.code, entry.title);
        out.line(out.paint(Tone::Strong, &head));
        out.line(format!("\n{}", entry.text));
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_entry_says_something_and_codes_are_in_order() {
        assert!(!ENTRIES.is_empty());
        assert!(ENTRIES.windows(2).all(|w| w[0].code < w[1].code), "sorted and unique");
        for e in ENTRIES.iter() {
            assert!(!e.title.is_empty() && e.text.len() > 30, "{} says too little", e.code);
            assert!(e.exit.is_none_or(|n| (1..=5).contains(&n)), "{}", e.code);
            assert!(!e.title.contains("(exit"), "{}", e.code);
        }
    }

    /// Every number given to a problem anywhere in the sources.
    fn codes_in(path: &Path, found: &mut BTreeSet<(u16, String)>) {
        for item in std::fs::read_dir(path).into_iter().flatten().flatten() {
            let path = item.path();
            // Tests may invent codes; the edge to the kernel has numbers of its own.
            if path.file_name().is_some_and(|n| n == "tests.rs" || n == "tests" || n == "sys") {
                continue;
            }
            if path.is_dir() {
                codes_in(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let source = std::fs::read_to_string(&path).unwrap_or_default();
                let source = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
                for number in numbers(source) {
                    found.insert((number, path.display().to_string()));
                }
            }
        }
    }

    fn numbers(source: &str) -> Vec<u16> {
        let mut found = Vec::new();
        for opening in ["harmless(", "Code(", "problem(", "refused(", "fail("] {
            for after in source.split(opening).skip(1) {
                found.extend(leading_code(after));
            }
        }
        // Constants and tables of codes, by their type or by their written form.
        for line in source.lines().filter(|l| !l.trim_start().starts_with("//")) {
            if line.contains(": u16 =") || line.contains("Code = Code(") {
                found.extend(
                    line.split_once("= ")
                        .and_then(|(_, v)| leading_code(v.trim_start_matches("Code("))),
                );
            }
            // A code alone on its line, as arguments and tuples are formatted.
            if let Some(alone) = line.trim().strip_suffix(',').filter(|l| l.len() == 4) {
                found.extend(leading_code(alone));
            }
            for after in line.split("FS-").skip(1) {
                found.extend(leading_code(after));
            }
        }
        found
    }

    fn leading_code(text: &str) -> Option<u16> {
        let text = text.trim_start();
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        let code = (digits.len() == 4).then(|| digits.parse().ok()).flatten();
        code.filter(|c| (1000..7000).contains(c))
    }

    #[test]
    fn every_code_in_the_sources_is_explained() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut found = BTreeSet::new();
        for part in ["blkfilter", "agent", "target", "tools"] {
            codes_in(&root.join(part), &mut found);
        }
        assert!(found.len() > 10, "the search finds codes at all");
        let unknown: Vec<_> = found.iter().filter(|(n, _)| entry(Code(*n)).is_none()).collect();
        assert!(unknown.is_empty(), "not in docs/errors.md: {unknown:#?}");
    }
}
