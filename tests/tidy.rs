//! The repository keeps its own rules: layout, direction of dependencies, where unsafe code may
//! live, sizes, and that no text names the machine it was written on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Lines a file of code may have.
const MAX_FILE_LINES: usize = 600;
/// Lines a function may have without a reason written above it.
const MAX_FUNCTION_LINES: usize = 70;
/// The words that introduce such a reason.
const REASON: &str = "long because";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file under version control or about to be, relative to the root.
fn files() -> Vec<PathBuf> {
    let out = std::process::Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git lists the files of the repository");
    assert!(out.status.success(), "git ls-files failed");
    let text = String::from_utf8(out.stdout).expect("paths are UTF-8");
    text.lines().map(PathBuf::from).filter(|p| root().join(p).is_file()).collect()
}

fn rust_files() -> Vec<(PathBuf, String)> {
    let rust = |p: &PathBuf| p.extension().is_some_and(|e| e == "rs");
    let read = |p: PathBuf| {
        let text = fs::read_to_string(root().join(&p)).expect("source files are readable");
        (p, text)
    };
    files().into_iter().filter(rust).map(read).collect()
}

#[test]
fn the_top_level_is_the_agreed_one() {
    let agreed = BTreeSet::from([
        "Cargo.toml",
        "Cargo.lock",
        "agent",
        "blkfilter",
        "target",
        "tools",
        "tests",
        "benches",
        "docs",
        "README.md",
        "DESIGN.md",
        "SPECIFICATION.md",
        "GLOSSARY.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "rustfmt.toml",
        "clippy.toml",
        "deny.toml",
        ".cargo",
        ".ci",
        ".gitignore",
    ]);
    for file in files() {
        let first = file.iter().next().and_then(|c| c.to_str()).unwrap_or_default().to_owned();
        assert!(
            agreed.contains(first.as_str()),
            "{} does not belong at the top level",
            file.display()
        );
    }
}

#[test]
fn no_build_output_lies_in_the_source_folder_target() {
    for trace in ["target/debug", "target/release", "target/CACHEDIR.TAG"] {
        assert!(!root().join(trace).exists(), "{trace}: cargo wrote into a source folder");
    }
    let config = fs::read_to_string(root().join(".cargo/config.toml")).expect("cargo config");
    assert!(config.contains("target-dir = \".build\""));
    let ignored = fs::read_to_string(root().join(".gitignore")).expect("gitignore");
    let hides_target = |l: &str| matches!(l.trim().trim_matches('/'), "target");
    assert!(!ignored.lines().any(hides_target), "target/ must never be ignored");
}

#[test]
fn dependencies_follow_the_way_of_a_write() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("blkfilter/extent", &[][..]),
        ("blkfilter/changelog", &["farshore-extent"][..]),
        ("blkfilter", &["farshore-extent", "farshore-changelog"][..]),
        ("target/protocol", &["farshore-extent", "farshore-changelog"][..]),
        (
            "agent",
            &["farshore-extent", "farshore-changelog", "farshore-blkfilter", "farshore-protocol"][..],
        ),
        (
            "target",
            &["farshore-extent", "farshore-changelog", "farshore-blkfilter", "farshore-protocol"][..],
        ),
    ]);
    for (folder, may) in allowed {
        let manifest =
            fs::read_to_string(root().join(folder).join("Cargo.toml")).expect("manifest");
        let product = manifest.split("[dev-dependencies]").next().unwrap_or_default();
        for line in product.lines().filter(|l| l.starts_with("farshore-")) {
            let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
            assert!(may.contains(&name), "{folder} must not depend on {name}");
        }
    }
}

#[test]
fn the_agent_uses_only_the_control_side_of_blkfilter_and_the_target_only_its_front_ends() {
    for (path, text) in rust_files() {
        let forbidden: &[&str] = if path.starts_with("agent/src") {
            &["core", "filter", "filterd", "frontend", "backing", "device"]
        } else if path.starts_with("target/src") {
            &["core", "filter", "filterd", "control", "backing", "preflight"]
        } else {
            continue;
        };
        for module in forbidden {
            let used = text.contains(&format!("farshore_blkfilter::{module}::"))
                || text.contains(&format!("farshore_blkfilter::{module};"));
            assert!(!used, "{} uses farshore_blkfilter::{module}", path.display());
        }
    }
}

#[test]
fn cores_know_no_files_no_sockets_and_no_clock() {
    let cores = [
        "blkfilter/extent/src",
        "blkfilter/changelog/src",
        "target/protocol/src",
        "blkfilter/src/core",
    ];
    for (path, text) in rust_files() {
        if !cores.iter().any(|c| path.starts_with(c)) {
            continue;
        }
        let product = text.split("#[cfg(test)]").next().unwrap_or_default();
        for word in ["tokio", "std::fs", "std::net", "Instant::now"] {
            let used =
                product.lines().any(|l| l.contains(word) && !l.trim_start().starts_with("//"));
            assert!(!used, "{} uses {word}", path.display());
        }
        if path.starts_with("blkfilter/src/core") {
            for word in ["SystemTime", "HashMap", "HashSet", "WallTime::now"] {
                assert!(!product.contains(word), "{} uses {word}", path.display());
            }
        }
    }
}

#[test]
fn unsafe_code_lives_in_one_place_and_says_why_it_is_sound() {
    for (path, text) in rust_files() {
        let uses = |l: &str| {
            let code = l.split("//").next().unwrap_or_default();
            ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"]
                .iter()
                .any(|w| code.contains(w))
        };
        if path == Path::new("tests/tidy.rs") || !text.lines().any(uses) {
            continue;
        }
        assert!(path.starts_with("blkfilter/src/sys"), "{} has unsafe code", path.display());
        assert!(text.contains("SAFETY"), "{} does not say why it is sound", path.display());
    }
    for folder in
        ["blkfilter/extent", "blkfilter/changelog", "target/protocol", "agent", "target", "tools"]
    {
        let lib = root().join(folder).join("src/lib.rs");
        let text = fs::read_to_string(&lib).expect("every crate has a lib.rs");
        assert!(
            text.contains("#![forbid(unsafe_code)]"),
            "{} must forbid unsafe code",
            lib.display()
        );
    }
}

#[test]
fn files_and_functions_stay_short() {
    let mut long = Vec::new();
    for (path, text) in rust_files() {
        let lines: Vec<&str> = text.lines().collect();
        if lines.len() > MAX_FILE_LINES {
            long.push(format!("{}: {} lines", path.display(), lines.len()));
        }
        long.extend(
            long_functions(&lines)
                .into_iter()
                .map(|(n, len)| format!("{}:{n}: function of {len} lines", path.display())),
        );
    }
    assert!(long.is_empty(), "too long:\n{}", long.join("\n"));
}

/// Functions over the limit: line number and length. rustfmt's layout makes this exact: the
/// closing brace stands alone under the first letter of the line that opens the function.
fn long_functions(lines: &[&str]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        let words: Vec<&str> = code.split_whitespace().collect();
        let is_fn = words.iter().take(5).any(|w| *w == "fn") && !code.starts_with("//");
        if !is_fn {
            continue;
        }
        let close = format!("{}}}", " ".repeat(indent));
        let Some(len) = lines[at..].iter().position(|l| *l == close) else { continue };
        let ends_before = lines[at..at + len]
            .iter()
            .any(|l| l.trim_end().ends_with(';') && l.len() - l.trim_start().len() == indent);
        let excused = lines[at.saturating_sub(8)..at].iter().any(|l| l.contains(REASON));
        if len + 1 > MAX_FUNCTION_LINES && !ends_before && !excused {
            found.push((at + 1, len + 1));
        }
    }
    found
}

#[test]
fn no_text_names_a_machine_or_a_registry() {
    let here = format!("{}/", root().display());
    for file in files() {
        if file == Path::new("Cargo.lock") || file == Path::new("tests/tidy.rs") {
            continue;
        }
        let Ok(text) = fs::read_to_string(root().join(&file)) else { continue };
        assert!(!text.contains(&here), "{} names a folder of this machine", file.display());
        for host in
            ["deb.debian.org", "index.crates.io", "static.crates.io", "pypi.org", "registry.npmjs"]
        {
            assert!(!text.contains(host), "{} names the host {host}", file.display());
        }
    }
}

#[test]
fn every_test_that_the_specification_names_exists() {
    let text = fs::read_to_string(root().join("SPECIFICATION.md")).expect("specification");
    let sources: String = rust_files().into_iter().map(|(_, text)| text).collect();
    let is_test = |w: &&str| {
        w.contains('_')
            && w.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    let named: Vec<&str> = text.split('`').skip(1).step_by(2).filter(is_test).collect();
    assert!(named.len() > 20, "the specification names its tests");
    for name in named {
        let there =
            sources.contains(&format!("fn {name}(")) || sources.contains(&format!("    {name}:"));
        assert!(there, "SPECIFICATION.md names the test {name}, which does not exist");
    }
}

#[test]
fn every_module_says_what_it_owns() {
    for (path, text) in rust_files() {
        // The tests of a module belong to its head.
        if path.file_name().is_some_and(|n| n == "tests.rs") {
            continue;
        }
        let first =
            text.lines().find(|l| !l.trim().is_empty() && !l.starts_with("#!")).unwrap_or_default();
        assert!(first.starts_with("//!"), "{} does not begin with a //! head", path.display());
    }
}
