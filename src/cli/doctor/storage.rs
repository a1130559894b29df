//! The data directory and the files with secrets.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::Value;
use toml::de::{DeTable, DeValue};

use super::super::status::list;
use super::super::terminal::bytes;
use super::Finding;
use crate::config::Config;

/// Below this there is no room for the log's own files.
const FREE_BYTES_MIN: u64 = 64 << 20;
const TMPFS_MAGIC: i64 = 0x0102_1994;
const SUBJECT: &str = "data_dir";

pub(super) fn examine(data_dir: &Path, config: Option<&Config>, report: Option<&Value>) -> Vec<Finding> {
    let shown = data_dir.display();
    // Before the first start it is not there; where it will be made counts.
    let (place, is_new) = match data_dir.ancestors().find(|p| p.is_dir()) {
        Some(place) => (place, place != data_dir),
        None => {
            let remedy = format!("mkdir -p {shown}, owned by the user that tidegate runs as");
            return vec![Finding::failed(SUBJECT, format!("{shown} is not there"), remedy)];
        }
    };
    let mut findings = Vec::new();
    if let Err(e) = try_to_write(place) {
        let owner = std::fs::metadata(place).map(|m| m.uid()).unwrap_or_default();
        let remedy = match e.kind() {
            std::io::ErrorKind::PermissionDenied => format!(
                "run this as the gateway's user (it belongs to uid {owner}), or chown -R that user {}",
                place.display()
            ),
            std::io::ErrorKind::ReadOnlyFilesystem => {
                "the file system is read-only: mount it for writing, or look into dmesg for what made it so".to_owned()
            }
            std::io::ErrorKind::StorageFull => "make room on it".to_owned(),
            _ => "choose another data_dir".to_owned(),
        };
        findings.push(Finding::failed(
            SUBJECT,
            format!("{} cannot be written: {e}", place.display()),
            remedy,
        ));
        return findings;
    }
    let Some(space) = Space::of(place) else {
        findings.push(Finding::good(SUBJECT, format!("{shown} can be written")));
        return findings;
    };
    let limits: u64 = config.map_or(0, |c| c.streams.iter().map(|s| s.bytes_max).sum());
    let kept: u64 = report.map_or(0, |r| list(r, "streams").filter_map(|s| s["bytes"].as_u64()).sum());
    let wanted = limits.saturating_sub(kept);
    let free = bytes(space.free);
    let room = "make room, or lower max_bytes of the [[stream]]s";
    findings.push(if space.free < FREE_BYTES_MIN {
        Finding::failed(SUBJECT, format!("{shown}: only {free} free"), room)
    } else if space.files_free.is_some_and(|n| n < 100) {
        Finding::failed(
            SUBJECT,
            format!("{shown}: hardly any inodes free"),
            "remove files on that file system",
        )
    } else if space.free < wanted {
        let text = format!("{shown}: {free} free, but the streams may grow by {}", bytes(wanted));
        Finding::warning(SUBJECT, text, room)
    } else {
        let new = if is_new { ", made at the first start" } else { "" };
        let flash = if is_flash(place) { ", on an SD card or eMMC" } else { "" };
        Finding::good(SUBJECT, format!("{shown} can be written, {free} free{flash}{new}"))
    });
    if space.in_memory {
        let text = format!("{shown} is in memory: everything is lost with the power");
        findings.push(Finding::warning(SUBJECT, text, "put data_dir on a disk"));
    }
    findings
}

fn try_to_write(folder: &Path) -> std::io::Result<()> {
    let probe = folder.join(format!(".tidegate-doctor-{}", std::process::id()));
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&probe)
        .and_then(|mut file| std::io::Write::write_all(&mut file, b"tidegate doctor\n"));
    // Removed whether or not it could be filled.
    let _ = std::fs::remove_file(&probe);
    written
}

struct Space {
    free: u64,
    /// None where the file system does not count them.
    files_free: Option<u64>,
    in_memory: bool,
}

impl Space {
    #[allow(clippy::unnecessary_cast)] // The types of these fields differ between architectures.
    fn of(path: &Path) -> Option<Space> {
        let path = CString::new(path.as_os_str().as_bytes()).ok()?;
        // SAFETY: statvfs and statfs are plain integers, for which all zeroes is a valid value.
        let (mut vfs, mut fs): (libc::statvfs, libc::statfs) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        // SAFETY: the path is a C string and the structure of this frame; the call fills it in and keeps neither.
        let known = unsafe { libc::statvfs(path.as_ptr(), &raw mut vfs) } == 0;
        // SAFETY: as above.
        let typed = unsafe { libc::statfs(path.as_ptr(), &raw mut fs) } == 0;
        known.then(|| Space {
            free: (vfs.f_bavail as u64).saturating_mul(vfs.f_frsize as u64),
            files_free: (vfs.f_files > 0).then_some(vfs.f_favail as u64),
            in_memory: typed && fs.f_type as i64 == TMPFS_MAGIC,
        })
    }
}

/// mmcblk0p2 and the like.
fn is_flash(path: &Path) -> bool {
    let Ok(metadata) = std::fs::metadata(path) else {
        return false;
    };
    let device = format!(
        "/sys/dev/block/{}:{}",
        libc::major(metadata.dev()),
        libc::minor(metadata.dev())
    );
    std::fs::read_link(device).is_ok_and(|to| to.to_string_lossy().contains("mmcblk"))
}

/// Files that gateway.toml takes secrets from, which not everybody should be able to read.
pub(super) fn secrets(path: &Path) -> Vec<Finding> {
    let Ok(text) = std::fs::read_to_string(path) else {
        return Vec::new();
    };
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let folder = absolute.parent().unwrap_or(Path::new("/"));
    let (root, _) = DeTable::parse_recoverable(&text);
    let mut files = Vec::new();
    in_table(root.get_ref(), &mut files);
    files
        .iter()
        .filter_map(|file| too_open("secret", &folder.join(file)))
        .collect()
}

/// `password = { file = "…" }`, wherever it stands.
fn in_table(table: &DeTable<'_>, out: &mut Vec<PathBuf>) {
    if let Some(file) = table.get("file").filter(|_| table.len() == 1) {
        out.extend(file.get_ref().as_str().map(PathBuf::from));
    }
    for (_, value) in table.iter() {
        in_value(value.get_ref(), out);
    }
}

fn in_value(value: &DeValue<'_>, out: &mut Vec<PathBuf>) {
    match value {
        DeValue::Table(table) => in_table(table, out),
        DeValue::Array(items) => items.iter().for_each(|item| in_value(item.get_ref(), out)),
        _ => {}
    }
}

/// A file with a secret that every user of the machine can read.
pub(super) fn too_open(subject: &str, path: &Path) -> Option<Finding> {
    let mode = std::fs::metadata(path).ok()?.permissions().mode();
    (mode & 0o004 != 0).then(|| {
        let shown = path.display();
        Finding::warning(
            subject,
            format!("every user of this machine can read {shown}"),
            format!("chmod 640 {shown}, its group that of the gateway"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Verdict;

    #[test]
    fn a_folder_that_can_be_written_is_good_and_left_as_it_was() {
        let folder = std::env::temp_dir().join(format!("tidegate-doctor-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        for data_dir in [folder.clone(), folder.join("not/there/yet")] {
            let findings = examine(&data_dir, None, None);
            assert!(findings.iter().all(|f| f.verdict != Verdict::Failed), "{findings:?}");
        }
        assert_eq!(std::fs::read_dir(&folder).expect("readable").count(), 0);
        std::fs::remove_dir_all(&folder).expect("removable");
        let findings = examine(Path::new("/proc/self/data"), None, None);
        assert_eq!(findings[0].verdict, Verdict::Failed, "{findings:?}");
    }

    #[test]
    fn files_of_secrets_are_found_wherever_they_stand() {
        let text =
            "[[uplink]]\npassword = { file = 'a' }\nx = [{ y = { file = 'b' } }]\n[other]\nfile = 'no'\npath = 'c'\n";
        let (root, _) = DeTable::parse_recoverable(text);
        let mut files = Vec::new();
        in_table(root.get_ref(), &mut files);
        files.sort();
        assert_eq!(files, [PathBuf::from("a"), PathBuf::from("b")]);
    }
}
