//! Golden files of the JSON documents: a change of shape must be seen in review.

use std::path::Path;

use serde_json::Value;

/// Compares with `tools/golden/NAME`; `FARSHORE_BLESS=1` writes it.
pub fn same(name: &str, document: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name);
    let text = format!("{}\n", serde_json::to_string_pretty(document).unwrap());
    if std::env::var_os("FARSHORE_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(golden, text, "{} differs; fields may be added, never renamed", path.display());
}
