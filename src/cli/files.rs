//! Where gateway.toml is looked for, and the one that `init` writes.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// The repository's own gateway.toml: what a clone starts with is what `init` writes.
pub(super) const TEMPLATE: &str = include_str!("../../gateway.toml");

const PLACES: [&str; 2] = ["gateway.toml", "/etc/tidegate/gateway.toml"];

/// The first of the usual places that has a file. One that may not be read is reported, not passed over.
pub(super) fn find() -> anyhow::Result<PathBuf> {
    let found = PLACES
        .iter()
        .map(Path::new)
        .find(|path| !matches!(path.try_exists(), Ok(false)));
    match found {
        Some(path) => Ok(path.to_owned()),
        None => bail!(
            "there is neither ./gateway.toml nor /etc/tidegate/gateway.toml\n\
             hint: `tidegate init` writes one here; --config FILE names another"
        ),
    }
}

/// Writes the template and never over anything; returns where it is.
pub(super) fn init(path: &Path) -> anyhow::Result<PathBuf> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = match path.is_dir() {
        true if path == Path::new(".") => PathBuf::from("gateway.toml"),
        true => path.join("gateway.toml"),
        false => path.to_owned(),
    };
    // It may come to hold a password: not for everybody.
    let opened = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o640)
        .open(&path);
    let mut file = match opened {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!(
                "{} is there already and is left as it is\nhint: name another file: `tidegate init FILE`",
                path.display()
            )
        }
        opened => opened.with_context(|| format!("cannot write {}", path.display()))?,
    };
    let written = file.write_all(TEMPLATE.as_bytes()).and_then(|()| file.sync_all());
    written.with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_writes_once_and_overwrites_nothing() {
        let folder = std::env::temp_dir().join(format!("tidegate-init-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let path = init(&folder).expect("written");
        assert_eq!(path, folder.join("gateway.toml"));
        assert!(crate::config::load(&path).expect("valid").warnings.is_empty());
        std::fs::write(&path, "mine").expect("writable");
        let error = init(&path).expect_err("refused").to_string();
        assert!(error.contains("is there already"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).expect("readable"), "mine");
        assert!(init(&folder.join("none/gateway.toml")).is_err());
        std::fs::remove_dir_all(&folder).expect("removable");
    }
}
