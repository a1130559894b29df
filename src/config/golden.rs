//! Golden tests: `golden/NAME.toml` beside `golden/NAME.txt`, what a user sees for it.
//! `TIDEGATE_GOLDEN=write cargo test golden` writes the expected texts anew; read the difference before committing it.

use std::path::{Path, PathBuf};

use super::{Faults, parse};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/config/golden")
}

fn inputs() -> Vec<PathBuf> {
    let mut inputs: Vec<PathBuf> = std::fs::read_dir(folder())
        .expect("the folder is part of the source")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .collect();
    inputs.sort();
    inputs
}

/// What `tidegate check` says.
fn said(input: &Path) -> String {
    let text = std::fs::read_to_string(input).expect("readable");
    let path = Path::new("gateway.toml");
    match parse(&text, path, &|name| {
        (name == "SET").then(|| "from the environment".to_owned())
    }) {
        Ok(config) => config
            .warnings
            .iter()
            .map(|w| format!("{w}\n\n"))
            .chain(["valid\n".to_owned()])
            .collect(),
        // Relative paths are said as absolute ones.
        Err(faults) => format!("{}\n", Faults::new(path, &text, faults)).replace(env!("CARGO_MANIFEST_DIR"), "/here"),
    }
}

#[test]
fn every_golden_file_gives_its_text() {
    let write = std::env::var("TIDEGATE_GOLDEN").is_ok_and(|v| v == "write");
    let inputs = inputs();
    assert!(inputs.len() >= 12, "only {} files", inputs.len());
    let mut different = Vec::new();
    for input in inputs {
        let expected = input.with_extension("txt");
        let said = said(&input);
        if write {
            std::fs::write(&expected, &said).expect("writable");
        } else if std::fs::read_to_string(&expected).unwrap_or_default() != said {
            different.push(format!("{}:\n{said}", input.display()));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n\n"));
}

/// Each golden file cut off anywhere, and with each byte gone: no panic, spans that can be shown, and no secret.
#[test]
fn a_damaged_file_is_a_fault_and_never_a_panic_or_a_leak() {
    let path = Path::new("gateway.toml");
    for input in inputs() {
        let text = std::fs::read_to_string(&input).expect("readable");
        for at in (0..text.len()).filter(|at| text.is_char_boundary(*at)) {
            let next = (at + 1..=text.len())
                .find(|n| text.is_char_boundary(*n))
                .unwrap_or(text.len());
            for damaged in [text[..at].to_owned(), format!("{}{}", &text[..at], &text[next..])] {
                if let Err(faults) = parse(&damaged, path, &|_| None) {
                    assert!(!faults.is_empty());
                    let shown = Faults::new(path, &damaged, faults).to_string();
                    assert!(!shown.contains("hunter2"), "{}: at {at}: {shown}", input.display());
                }
            }
        }
    }
}
