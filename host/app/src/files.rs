//! Small files that the configuration names, read whole: keys, certificates, lists of keys.
//!
//! One reader, so that none of them can be endless, and each fault names its file. The private key of a certificate must not be
//! open to everybody on the machine, because whoever has it is this host: only its owner and its group may read it.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Largest of them: a long chain has some 10 KiB, the most API keys a fraction of it.
const MAX_BYTES: u64 = 1 << 20;

/// Why a file cannot be used; the operator's fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("{path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} exceeds {MAX_BYTES} bytes")]
    TooLarge { path: PathBuf },
    #[error("{path} is no text in UTF-8")]
    Text { path: PathBuf },
    #[error(
        "{path} can be read by everybody on this machine: a private key is for its owner and its group, as after `chmod o= {path}`"
    )]
    Open { path: PathBuf },
}

/// What a file holds.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    read_up_to_the_limit(File::open(path).map_err(unreadable(path))?, path)
}

/// The same of a private key, which everybody may not read.
pub(crate) fn read_secret(path: &Path) -> Result<Vec<u8>, FileError> {
    let file = File::open(path).map_err(unreadable(path))?;
    if file.metadata().map_err(unreadable(path))?.mode() & 0o007 != 0 {
        return Err(FileError::Open { path: path.to_owned() });
    }
    read_up_to_the_limit(file, path)
}

/// The text that a file holds.
pub(crate) fn read_text(path: &Path) -> Result<String, FileError> {
    String::from_utf8(read(path)?).map_err(|_| FileError::Text { path: path.to_owned() })
}

fn unreadable(path: &Path) -> impl Fn(io::Error) -> FileError {
    move |source| FileError::Read { path: path.to_owned(), source }
}

fn read_up_to_the_limit(file: File, path: &Path) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    let read = file.take(MAX_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(unreadable(path))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_bounded_and_a_secret_is_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        let write = |bytes: &[u8], mode: u32| {
            std::fs::write(&path, bytes).expect("it can be written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("a file of ours");
        };
        let most = usize::try_from(MAX_BYTES).expect("a small number");
        write(&vec![b'x'; most], 0o644);
        assert_eq!(read(&path).expect("it fits").len(), most);
        assert!(matches!(read_secret(&path), Err(FileError::Open { .. })));
        write(&vec![b'x'; most + 1], 0o640);
        assert!(matches!(read(&path), Err(FileError::TooLarge { .. })));
        assert!(matches!(read_secret(&path), Err(FileError::TooLarge { .. })));
        write(&[0xff], 0o600);
        assert!(matches!((read_text(&path), read_secret(&path)), (Err(FileError::Text { .. }), Ok(_))));
        assert!(matches!(read(folder.path()), Err(FileError::Read { .. })));
        assert!(matches!(read(Path::new("/dev/zero")), Err(FileError::TooLarge { .. })));
    }
}
