//! Files and batches on the disk: a document and a content for each, in one folder of the data directory.
//!
//! Documents are replaced as slots' are, written aside, synced and renamed; contents grow at their end. Names come from the
//! server, which makes them itself; whatever it is asked for, a name that could lead out of the folder is none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use pointsman_server::ports::Shelf;

use crate::store::{Store, sync_folder, write_aside};

/// The folder.
#[derive(Debug)]
pub(crate) struct DiskShelf {
    folder: PathBuf,
}

impl DiskShelf {
    /// The shelf of a data directory, which its lock keeps to one process.
    pub(crate) fn of(store: &Store) -> Self {
        Self { folder: store.batches() }
    }

    fn path(&self, name: &str, extension: &str) -> io::Result<PathBuf> {
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if name.is_empty() || !name.bytes().all(is_plain) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        Ok(self.folder.join(format!("{name}.{extension}")))
    }

    fn document(&self, name: &str) -> io::Result<PathBuf> {
        self.path(name, "json")
    }

    fn content(&self, name: &str) -> io::Result<PathBuf> {
        self.path(name, "data")
    }

    /// Files with this extension, by name.
    fn named(&self, extension: &str) -> io::Result<Vec<(String, PathBuf)>> {
        let entries = fs::read_dir(&self.folder)?;
        let named = |path: PathBuf| {
            let name = path.extension().is_some_and(|e| e == extension).then(|| path.file_stem()?.to_str())??;
            Some((name.to_owned(), path.clone()))
        };
        Ok(entries.flatten().filter_map(|entry| named(entry.path())).collect())
    }
}

impl Shelf for DiskShelf {
    fn documents(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        self.named("json")?.into_iter().map(|(name, path)| Ok((name, fs::read(path)?))).collect()
    }

    fn contents(&self) -> io::Result<Vec<(String, u64)>> {
        self.named("data")?.into_iter().map(|(name, path)| Ok((name, fs::metadata(path)?.len()))).collect()
    }

    fn write_document(&self, name: &str, text: &[u8]) -> io::Result<()> {
        write_aside(&self.document(name)?, text)
    }

    fn append(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        OpenOptions::new().create(true).append(true).open(self.content(name)?)?.write_all(bytes)
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        match File::open(self.content(name)?) {
            Ok(file) => file.sync_all()?,
            // Nothing was ever appended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        sync_folder(&self.folder)
    }

    fn read(&self, name: &str, at: u64, most: usize) -> io::Result<Vec<u8>> {
        let mut file = match File::open(self.content(name)?) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            file => file?,
        };
        file.seek(SeekFrom::Start(at))?;
        let mut bytes = Vec::new();
        file.take(most as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn length(&self, name: &str) -> io::Result<u64> {
        length(&self.content(name)?)
    }

    fn cut(&self, name: &str, length: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.content(name)?)?;
        file.set_len(length)?;
        file.sync_all()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        // The document first: a content of nothing is swept at the next start.
        for path in [self.document(name)?, self.content(name)?] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        sync_folder(&self.folder)
    }
}

fn length(path: &Path) -> io::Result<u64> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        found => Ok(found?.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_there_is_there_and_nowhere_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("an empty folder");
        let shelf = DiskShelf::of(&store);
        shelf.write_document("file-1", b"{}").expect("a writable folder");
        shelf.append("file-1", b"one\ntwo\n").expect("a writable folder");
        shelf.append("file-1", b"thr").expect("a writable folder");
        shelf.sync("file-1").and_then(|()| shelf.sync("file-9")).expect("a synced folder");
        assert_eq!(shelf.documents().expect("readable"), [("file-1".to_owned(), b"{}".to_vec())]);
        assert_eq!(shelf.contents().expect("readable"), [("file-1".to_owned(), 11)]);
        for (at, most, expect) in [(0, 3, "one"), (4, 99, "two\nthr"), (11, 9, ""), (99, 9, "")] {
            assert_eq!(shelf.read("file-1", at, most).expect("readable"), expect.as_bytes(), "{at}");
        }
        shelf.cut("file-1", 8).expect("writable");
        assert_eq!((shelf.length("file-1").ok(), shelf.length("file-9").ok()), (Some(8), Some(0)));
        for name in ["", "../lock", "a/b", "a.b"] {
            assert!(shelf.append(name, b"x").is_err(), "{name}");
        }
        shelf.remove("file-1").and_then(|()| shelf.remove("file-1")).expect("writable");
        assert_eq!((shelf.documents().expect("readable").len(), shelf.contents().expect("readable").len()), (0, 0));
    }
}
