//! Secrets: typed in place, or taken from a file, an environment variable or a systemd credential. No fault shows one.

use std::io::Read;
use std::path::{Path, PathBuf};

use toml::de::DeValue;

use super::Secret;
use super::check::Checker;
use super::fault::Fault;
use super::read::{At, Section, Span, list, nearest};

/// A file with a secret in it is small; a larger one is the wrong file.
const SECRET_BYTES_MAX: u64 = 64 << 10;
const SOURCES: [&str; 3] = ["file", "env", "credential"];

impl Checker<'_> {
    /// `password = "…"`, `{ file = "…" }`, `{ env = "…" }` or `{ credential = "…" }`.
    pub(super) fn secret(&mut self, section: &mut Section<'_, '_>, key: &'static str) -> Option<At<Secret>> {
        let value = section.take(key);
        section.takes(key, || {
            "text, or { file = … }, { env = … } or { credential = … }".to_owned()
        });
        let value = value?;
        let span = value.span();
        let table = match value.get_ref() {
            DeValue::String(text) => {
                // A hash is meant to be kept in files.
                if key != "password_hash" {
                    self.secrets_typed.push(span.clone());
                }
                return self.not_empty(key, text.as_ref().to_owned(), span);
            }
            DeValue::Table(table) => table,
            _ => {
                let wanted = "a string or a table that says where it is";
                section.wrong(&mut self.notes, key, value, wanted, "{ file = \"…\" }");
                return None;
            }
        };
        if table.len() != 1 {
            let message = format!("{key} in {} must have one of {}", section.label, list(SOURCES));
            self.notes
                .fault(Fault::new(span, message).hint(format!("write {key} = {{ file = \"…\" }}")));
            return None;
        }
        let (source, place) = table.iter().next()?;
        let name: &str = source.get_ref();
        if !SOURCES.contains(&name) {
            let hint = match nearest(name, SOURCES) {
                Some(near) => format!("did you mean {near:?}?"),
                None => format!("write {key} = {{ file = \"…\" }}, {{ env = \"…\" }} or {{ credential = \"…\" }}"),
            };
            let message = format!("{key} in {} cannot be taken from {name:?}", section.label);
            self.notes.fault(Fault::new(source.span(), message).hint(hint));
            return None;
        }
        let Some(place_text) = place.get_ref().as_str() else {
            section.wrong(&mut self.notes, name, place, "a string", "\"…\"");
            return None;
        };
        if !self.notes.is_one_line(place_text, place.span()) {
            return None;
        }
        let found = match name {
            "file" => read_file(&self.folder.join(place_text)).map_err(|error| {
                let hint = match Path::new(place_text).is_relative() {
                    true => "a relative path is relative to the folder of this file",
                    false => "it must be readable by the user that tidegate runs as",
                };
                Fault::new(
                    place.span(),
                    format!("{key} cannot be read from {place_text:?}: {error}"),
                )
                .hint(hint)
            }),
            "env" => (self.env)(place_text).ok_or_else(|| {
                let message = format!("{key}: there is no environment variable {place_text:?}, or it is not UTF-8");
                Fault::new(place.span(), message).hint("under systemd: Environment= or EnvironmentFile= of the service")
            }),
            _ => self.credential(place_text).map_err(|error| {
                let hint = format!("under systemd: LoadCredential={place_text}:/path/to/it in the service");
                Fault::new(place.span(), format!("{key}: no credential {place_text:?}: {error}")).hint(hint)
            }),
        };
        match found {
            Ok(text) => self.not_empty(key, text, place.span()),
            Err(fault) => {
                self.notes.fault(fault);
                None
            }
        }
    }

    /// A path, or `{ file = "…" }`, or `{ credential = "…" }` for a file that systemd gives the service to read.
    pub(super) fn file(
        &mut self,
        section: &mut Section<'_, '_>,
        key: &'static str,
        example: &str,
    ) -> Option<At<PathBuf>> {
        let table = match section.peek(key).map(toml::Spanned::get_ref) {
            Some(DeValue::Table(table)) => table,
            _ => {
                let path = self.path(section, key, example);
                section.takes(key, || "path, or { credential = … }".to_owned());
                return path;
            }
        };
        let value = section.take(key)?;
        let (source, place) = match table.iter().next() {
            Some(only) if table.len() == 1 => only,
            _ => {
                section.wrong(&mut self.notes, key, value, "a path or { credential = \"…\" }", example);
                return None;
            }
        };
        let text = place.get_ref().as_str().unwrap_or_default();
        let path = match (source.get_ref().as_ref(), text) {
            ("file", text) if !text.is_empty() => Ok(self.folder.join(text)),
            ("credential", text) if !text.is_empty() => self.credential_path(text),
            _ => {
                section.wrong(&mut self.notes, key, value, "a path or { credential = \"…\" }", example);
                return None;
            }
        };
        match path {
            Ok(value) => Some(At {
                value,
                span: place.span(),
            }),
            Err(error) => {
                let hint = format!("under systemd: LoadCredential={text}:/path/to/it in the service");
                let message = format!("{key}: no credential {text:?}: {error}");
                self.notes.fault(Fault::new(place.span(), message).hint(hint));
                None
            }
        }
    }

    fn not_empty(&mut self, key: &str, text: String, span: Span) -> Option<At<Secret>> {
        if text.is_empty() {
            self.notes
                .fault(Fault::new(span, format!("{key} is empty")).hint("leave it out where none is needed"));
            return None;
        }
        Some(At {
            value: Secret::new(text),
            span,
        })
    }

    fn credential(&self, name: &str) -> Result<String, String> {
        read_file(&self.credential_path(name)?)
    }

    fn credential_path(&self, name: &str) -> Result<PathBuf, String> {
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err("a credential has a plain name".to_owned());
        }
        let folder = (self.env)("CREDENTIALS_DIRECTORY").ok_or("CREDENTIALS_DIRECTORY is not set")?;
        Ok(PathBuf::from(folder).join(name))
    }
}

/// The content without one newline at its end, which editors and `echo` add; spaces are kept.
fn read_file(path: &Path) -> Result<String, String> {
    // Opening a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(|e| reason(&e))?.is_file() {
        return Err("it is not a file".to_owned());
    }
    let file = std::fs::File::open(path).map_err(|e| reason(&e))?;
    let mut bytes = Vec::new();
    file.take(SECRET_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| reason(&e))?;
    if bytes.len() as u64 > SECRET_BYTES_MAX {
        return Err("it is larger than 64 KiB".to_owned());
    }
    let mut text = String::from_utf8(bytes).map_err(|_| "it is not UTF-8 text".to_owned())?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        std::io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    }
}

/// Whether every user of the machine may read the file.
pub(super) fn is_readable_by_all(metadata: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt;
    metadata.permissions().mode() & 0o004 != 0
}
