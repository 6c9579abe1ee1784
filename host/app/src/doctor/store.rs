//! The data directory: whether it can be used, and who uses it now.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use pointsman_engine::cuda::Bytes;

use super::report::Report;
use crate::causes::told;

/// Room under which somebody should look: some components, their compiled code and a journal.
const LITTLE_ROOM: u64 = 1 << 30;

/// Says whether a host runs on it.
pub(super) fn examine(root: &anyhow::Result<PathBuf>, report: &mut Report<'_>) -> anyhow::Result<bool> {
    let root = match root {
        Ok(root) => root,
        Err(error) => {
            report.fault("store", "data directory", told(error.chain()), "name a folder with --data-dir")?;
            return Ok(false);
        }
    };
    let shown = root.display().to_string();
    let remedy = "make it writable for this user, or choose another with --data-dir";
    let is_there = match fs::symlink_metadata(root) {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        Err(error) => {
            report.fault("store", &shown, error.to_string(), remedy)?;
            return Ok(false);
        }
    };
    // The folder in which something would be written first.
    let first = root.ancestors().find(|folder| folder.exists()).unwrap_or(root);
    if let Err(error) = tempfile::tempfile_in(first) {
        report.fault("store", &shown, format!("{} takes no files: {error}", first.display()), remedy)?;
        return Ok(false);
    }
    let in_use = is_there && is_locked(root);
    let state = match (is_there, in_use) {
        (false, _) => "not there yet; the first start makes it",
        (true, false) => "there, and no host runs on it",
        (true, true) => "there, and a host runs on it",
    };
    report.good("store", &shown, state)?;
    room(first, report)?;
    Ok(in_use)
}

/// Whether somebody holds the lock. A lock that cannot be opened is nobody's yet.
fn is_locked(root: &Path) -> bool {
    let Ok(lock) = File::open(root.join("lock")) else { return false };
    matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock))
}

fn room(folder: &Path, report: &mut Report<'_>) -> anyhow::Result<()> {
    let Ok(found) = rustix::fs::statvfs(folder) else { return Ok(()) };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let said = format!("{} free in {}", Bytes(free), folder.display());
    match free {
        0..LITTLE_ROOM => report.warn("store", "room", said, "make room: a full disk refuses activations and uploads"),
        _ => report.good("store", "room", said),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_told_from_one_in_use_and_from_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let used = folder.path().join("used");
        let _store = crate::store::Store::open(&used).expect("a store");
        let file = folder.path().join("file");
        fs::write(&file, "").expect("a file");
        let cases = [
            (Ok(used.clone()), true, 0, "a host runs on it"),
            (Ok(folder.path().join("none/below")), false, 0, "the first start makes it"),
            (Ok(folder.path().to_owned()), false, 0, "no host runs on it"),
            (Ok(file.join("below")), false, 1, "--data-dir"),
            (Err(anyhow::anyhow!("no home")), false, 1, "no home"),
        ];
        for (root, in_use, faults, said) in cases {
            let mut text = Vec::new();
            let mut report = Report::new(Some(&mut text));
            assert_eq!(examine(&root, &mut report).expect("it is printed"), in_use, "{root:?}");
            assert_eq!(report.faults(), faults, "{root:?}");
            let text = String::from_utf8(text).expect("text");
            assert!(text.contains(said), "{text}");
        }
        assert!(!folder.path().join("none").exists(), "nothing is made");
    }
}
