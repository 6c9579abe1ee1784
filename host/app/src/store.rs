//! The data directory: one process at a time, slot documents, component bytes, the compile cache and the journal file.
//!
//! Every document is written aside, synced and renamed, so that a crash leaves the old one or the new one, never half of
//! one; what could not be made to last is put back as it was, so that an error means that nothing has changed. A database would do the same and bring a C library; these are a handful of small files that people can read.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail};
use pointsman_control::{AliasDocument, Entry, Intent, ModelsDocument, SafeModeDocument, SlotDocument, SlotName};

use crate::trust::Signature;

/// The journal file moves aside at this size; one older file is kept.
const JOURNAL_BYTES: u64 = 16 << 20;
/// Journal entries that are read back at start come from this many bytes at the end of the file.
const JOURNAL_TAIL_BYTES: u64 = 1 << 20;

/// Lines that wait for a journal file that takes none; the oldest give way.
const MAX_WAITING_LINES: usize = 1_024;

/// Document of the switch that makes every slot native; there while it is on.
const SAFE_MODE: &str = "safe-mode.json";
/// Models that were loaded while the host ran; there once one was.
const MODELS: &str = "models.json";
/// What is being done that has no document; there until its line is written.
const INTENT: &str = "intent.json";

/// A locked data directory.
#[derive(Debug)]
pub(crate) struct Store {
    root: PathBuf,
    journal: Mutex<JournalFile>,
    /// Held for the life of the process.
    _lock: File,
}

/// Where lines go.
#[derive(Debug)]
struct JournalFile {
    file: File,
    /// What the file has not taken yet, the oldest first.
    waiting: VecDeque<String>,
}

/// A slot's document that cannot be read.
#[derive(Debug)]
pub(crate) struct Unreadable {
    /// Which, and why.
    pub why: String,
    /// Whether it may be of a policy that fails closed.
    pub may_be_closed: bool,
}

impl Store {
    /// Opens (and creates) the directory and takes its lock.
    ///
    /// # Errors
    /// It cannot be created or written, or another process holds it.
    pub(crate) fn open(root: &Path) -> anyhow::Result<Self> {
        let what = || format!("cannot use the data directory {}", root.display());
        for folder in ["slots", "aliases", "components", "compiled", "batches"] {
            fs::create_dir_all(root.join(folder)).with_context(what)?;
            // What cannot be listed must not look as if nothing were stored there.
            fs::read_dir(root.join(folder)).with_context(what)?;
        }
        // Prompts and answers are for nobody else on the machine.
        fs::set_permissions(root.join("batches"), Permissions::from_mode(0o700)).with_context(what)?;
        let lock = File::create(root.join("lock")).with_context(what)?;
        if lock.try_lock().is_err() {
            bail!(
                "another pointsman uses the data directory {}; stop it or choose another with --data-dir",
                root.display()
            );
        }
        ["", "slots", "aliases", "components", "batches"].iter().for_each(|folder| sweep(&root.join(folder)));
        sweep_signatures(&root.join("components"));
        let path = root.join("journal.jsonl");
        let mut journal = OpenOptions::new().create(true).append(true).open(&path).with_context(what)?;
        end_last_line(&path, &mut journal).with_context(what)?;
        let journal = JournalFile { file: journal, waiting: VecDeque::new() };
        Ok(Self { root: root.to_owned(), journal: Mutex::new(journal), _lock: lock })
    }

    /// Where the policy crate keeps compiled components.
    pub(crate) fn compiled(&self) -> PathBuf {
        self.root.join("compiled")
    }

    /// Where files and batches are kept.
    pub(crate) fn batches(&self) -> PathBuf {
        self.root.join("batches")
    }

    /// Every slot that has a document: the document, or what is wrong with its file.
    pub(crate) fn slot_documents(&self) -> Vec<(SlotName, Result<SlotDocument, Unreadable>)> {
        let Ok(entries) = fs::read_dir(self.root.join("slots")) else { return Vec::new() };
        let read = |path: PathBuf| {
            let slot: SlotName = path.file_name()?.to_str()?.strip_suffix(".json")?.parse().ok()?;
            let read = fs::read(&path);
            // Whoever wrote `closed` meant what it says, whatever has become of the rest.
            let may_be_closed = read.as_ref().map_or(true, |bytes| bytes.windows(8).any(|text| text == b"\"closed\""));
            let parsed = read.map_err(anyhow::Error::from).and_then(|bytes| Ok(SlotDocument::parse(&bytes)?));
            let unreadable = |error| Unreadable { why: format!("{}: {error:#}", path.display()), may_be_closed };
            Some((slot, parsed.map_err(unreadable)))
        };
        let mut documents: Vec<_> = entries.flatten().filter_map(|entry| read(entry.path())).collect();
        documents.sort_by(|(a, _), (b, _)| a.cmp(b));
        documents
    }

    /// Stores a slot's document so that it survives a crash.
    ///
    /// # Errors
    /// The disk does not take it; the old document stays.
    pub(crate) fn write_slot(&self, document: &SlotDocument) -> io::Result<()> {
        let path = self.root.join("slots").join(format!("{}.json", document.slot));
        write_aside(&path, document.to_json().as_bytes())
    }

    /// Deletes the documents of slots that were removed long ago. One that stays is forgotten again after the next start.
    pub(crate) fn forget_slots(&self, slots: &[SlotName]) {
        for slot in slots {
            if let Err(error) = fs::remove_file(self.root.join("slots").join(format!("{slot}.json"))) {
                tracing::warn!(%slot, "the document of a removed slot cannot be deleted: {error}");
            }
        }
    }

    /// Every alias's document, or what is wrong with its file.
    pub(crate) fn alias_documents(&self) -> Vec<Result<AliasDocument, String>> {
        let Ok(entries) = fs::read_dir(self.root.join("aliases")) else { return Vec::new() };
        let paths =
            entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "json"));
        let read = |path: PathBuf| {
            let parsed = fs::read(&path).map_err(anyhow::Error::from).and_then(|b| Ok(AliasDocument::parse(&b)?));
            parsed.map_err(|error| format!("{}: {error:#}", path.display()))
        };
        paths.map(read).collect()
    }

    /// Stores an alias's document so that it survives a crash.
    ///
    /// # Errors
    /// The disk does not take it; the old document stays.
    pub(crate) fn write_alias(&self, document: &AliasDocument) -> io::Result<()> {
        // A model may be called anything: what is not plain is written as its bytes.
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        let escape = |b: u8| if plain(b) { char::from(b).to_string() } else { format!("%{b:02x}") };
        let name: String = document.alias.bytes().map(escape).collect();
        write_aside(&self.root.join("aliases").join(format!("{name}.json")), document.to_json().as_bytes())
    }

    /// Keeps the bytes of a component, also in the place of a file that was damaged.
    ///
    /// # Errors
    /// The disk does not take them.
    pub(crate) fn write_component(&self, digest: &str, bytes: &[u8]) -> io::Result<()> {
        let is_kept = self.read_component(digest).is_ok_and(|kept| kept == bytes);
        if is_kept { Ok(()) } else { write_aside(&self.component_path(digest), bytes) }
    }

    /// The bytes of a kept component.
    ///
    /// # Errors
    /// It is not there or cannot be read.
    pub(crate) fn read_component(&self, digest: &str) -> io::Result<Vec<u8>> {
        fs::read(self.component_path(digest))
    }

    /// Keeps a component's signature beside it, so that a restart can check it again. The signature comes first and goes last: a
    /// crash leaves a signature of nothing, which the next start sweeps away, never a component that has lost its own.
    ///
    /// # Errors
    /// The disk does not take it; the old one stays.
    pub(crate) fn write_signature(&self, digest: &str, signature: Signature) -> io::Result<()> {
        write_aside(&self.component_path(digest).with_extension("sig"), format!("{}\n", signature.to_text()).as_bytes())
    }

    /// The signature of a kept component; one that cannot be read is none.
    pub(crate) fn read_signature(&self, digest: &str) -> Option<Signature> {
        Signature::parse(&fs::read(self.component_path(digest).with_extension("sig")).ok()?).ok()
    }

    /// Forgets a component, for good, and then its signature; none to forget is fine.
    ///
    /// # Errors
    /// The component cannot be removed; both stay.
    pub(crate) fn delete_component(&self, digest: &str) -> io::Result<()> {
        let path = self.component_path(digest);
        place(&path, None, sync_folder)?;
        // Of nothing it says nothing; where it stays, the next start sweeps it away.
        match fs::remove_file(path.with_extension("sig")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("the signature of the deleted {digest} cannot be removed: {error}");
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether a component is kept.
    pub(crate) fn has_component(&self, digest: &str) -> bool {
        self.component_path(digest).exists()
    }

    /// Digests of kept components.
    pub(crate) fn component_digests(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root.join("components")) else { return Vec::new() };
        let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
        names.filter_map(|name| Some(format!("sha256:{}", name.strip_suffix(".wasm")?))).collect()
    }

    fn component_path(&self, digest: &str) -> PathBuf {
        // Digests are checked where they enter; this keeps a path separator out whatever happens.
        let hex: String = digest.trim_start_matches("sha256:").chars().filter(char::is_ascii_hexdigit).collect();
        self.root.join("components").join(format!("{hex}.wasm"))
    }

    /// Appends a line to the journal file and syncs it. What a full disk refuses is written before the line that comes next.
    pub(crate) fn append_journal(&self, line: String) {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let JournalFile { file, waiting } = &mut *journal;
        if waiting.len() == MAX_WAITING_LINES {
            waiting.pop_front();
        }
        waiting.push_back(line);
        while let Some(line) = waiting.front() {
            if let Err(error) = self.append_to(file, line) {
                tracing::error!("the journal file takes no line, and {} wait: {error}", waiting.len());
                return;
            }
            waiting.pop_front();
        }
    }

    fn append_to(&self, file: &mut File, line: &str) -> io::Result<()> {
        let mut length = file.metadata()?.len();
        if length > JOURNAL_BYTES {
            let path = self.root.join("journal.jsonl");
            match fs::rename(&path, self.root.join("journal.1.jsonl")) {
                // None to move: an earlier attempt did that, and could not open the next one.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            *file = OpenOptions::new().create(true).append(true).open(path)?;
            File::open(&self.root)?.sync_all()?;
            length = file.metadata()?.len();
        }
        let written = file.write_all(format!("{line}\n").as_bytes()).and_then(|()| file.sync_data());
        // A part of a line would spoil the next one too; where it cannot be cut off, both are skipped when they are read.
        written.inspect_err(|_| drop(file.set_len(length)))
    }

    /// The last entries of the journal; lines that a crash cut short are skipped.
    pub(crate) fn journal_tail(&self) -> Vec<Entry> {
        let tail = |file: &str, limit: u64| tail_of(&self.root.join(file), limit).unwrap_or_default();
        let newer = tail("journal.jsonl", JOURNAL_TAIL_BYTES);
        // After it moved aside the file is short, and the older one goes on before it.
        let mut bytes = tail("journal.1.jsonl", JOURNAL_TAIL_BYTES.saturating_sub(newer.len() as u64));
        bytes.extend(newer);
        let lines = bytes.split(|byte| *byte == b'\n');
        lines.filter_map(|line| Entry::parse(std::str::from_utf8(line).ok()?).ok()).collect()
    }

    /// The switch that makes every slot native: its document, or what is wrong with it; `None` when it is off.
    pub(crate) fn read_safe_mode(&self) -> Option<Result<SafeModeDocument, String>> {
        match fs::read(self.root.join(SAFE_MODE)) {
            Ok(bytes) => Some(SafeModeDocument::parse(&bytes).map_err(|error| error.to_string())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(Err(error.to_string())),
        }
    }

    /// Stores the switch, or that it is off, so that it survives a crash.
    ///
    /// # Errors
    /// The disk does not take it.
    pub(crate) fn write_safe_mode(&self, document: Option<&SafeModeDocument>) -> io::Result<()> {
        let path = self.root.join(SAFE_MODE);
        match document {
            Some(document) => write_aside(&path, document.to_json().as_bytes()),
            None => place(&path, None, sync_folder),
        }
    }

    /// Models that were loaded while the host ran.
    ///
    /// # Errors
    /// The list cannot be read; what is in it must not be lost by writing another.
    pub(crate) fn models(&self) -> io::Result<ModelsDocument> {
        stored_models(&self.root)
    }

    /// Stores them so that they survive a crash.
    ///
    /// # Errors
    /// The disk does not take it; the old list stays.
    pub(crate) fn write_models(&self, models: &ModelsDocument) -> io::Result<()> {
        write_aside(&self.root.join(MODELS), models.to_json().as_bytes())
    }

    /// Stores what is about to be done, so that its line can be written after a crash.
    ///
    /// # Errors
    /// The disk does not take it; the old one stays.
    pub(crate) fn write_intent(&self, intent: &Intent) -> io::Result<()> {
        write_aside(&self.root.join(INTENT), intent.to_json().as_bytes())
    }

    /// What was being done when the host ended; one that cannot be read is none.
    pub(crate) fn read_intent(&self) -> Option<Intent> {
        let bytes = fs::read(self.root.join(INTENT)).ok()?;
        Intent::parse(&bytes).inspect_err(|error| tracing::error!("{INTENT} is skipped: {error}")).ok()
    }

    /// Its line is written. Not synced: one that comes back is found in the journal.
    pub(crate) fn forget_intent(&self) {
        // Gone already is fine.
        let _ = fs::remove_file(self.root.join(INTENT));
    }

    /// Whether the store has any document of this slot.
    #[must_use]
    pub(crate) fn knows(&self, slot: &SlotName) -> bool {
        self.root.join("slots").join(format!("{slot}.json")).exists()
    }
}

/// Models that were loaded while a host ran on this data directory, which somebody may be using.
///
/// # Errors
/// The list cannot be read.
pub(crate) fn stored_models(root: &Path) -> io::Result<ModelsDocument> {
    match fs::read(root.join(MODELS)) {
        Ok(bytes) => ModelsDocument::parse(&bytes).map_err(|error| io::Error::other(format!("{MODELS}: {error}"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(ModelsDocument::empty()),
        Err(error) => Err(error),
    }
}

/// The whole lines among the last `limit` bytes of a file.
fn tail_of(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let skipped = file.metadata()?.len().saturating_sub(limit);
    file.seek(SeekFrom::Start(skipped))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    if skipped > 0 {
        let cut = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |end| end + 1);
        bytes.drain(..cut);
    }
    Ok(bytes)
}

/// Ends a last line that a crash cut short, so that the next entry stands on its own.
fn end_last_line(path: &Path, journal: &mut File) -> io::Result<()> {
    let mut last = [b'\n'];
    let mut file = File::open(path)?;
    if file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    if last == *b"\n" { Ok(()) } else { journal.write_all(b"\n") }
}

/// Removes what a crash left of [`write_aside`].
fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(".tmp")) {
        // What stays is swept at the next start.
        let _ = fs::remove_file(entry.path());
    }
}

/// Removes the signatures whose components are gone, or never came.
fn sweep_signatures(components: &Path) {
    let Ok(entries) = fs::read_dir(components) else { return };
    let signatures =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "sig"));
    for signature in signatures.filter(|path| !path.with_extension("wasm").exists()) {
        // What stays is swept at the next start.
        let _ = fs::remove_file(signature);
    }
}

pub(crate) fn write_aside(path: &Path, bytes: &[u8]) -> io::Result<()> {
    place(path, Some(bytes), sync_folder)
}

pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Gives a file this content, or removes it, for good. Where the folder cannot be synced, a power failure may still undo that:
/// what was there before is put back, and the error means what the others mean.
fn place(path: &Path, bytes: Option<&[u8]>, sync: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    // One that cannot be read can be replaced all the same, and not be put back.
    let before = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(Some),
    };
    put(path, bytes)?;
    sync(folder_of(path)).inspect_err(|_| {
        if let Err(error) = before.and_then(|before| put(path, before.as_deref())) {
            tracing::error!("{} is not what the host works with: {error}", path.display());
        }
    })
}

/// What [`place`] does, as far as everybody sees it who reads the file.
fn put(path: &Path, bytes: Option<&[u8]>) -> io::Result<()> {
    let Some(bytes) = bytes else {
        return match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        };
    };
    let mut file = tempfile::NamedTempFile::new_in(folder_of(path))?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_control::rollout::Sticky;
    use pointsman_control::{ComponentRef, Deployment, Desired, DesiredAlias, Happened};

    #[test]
    fn what_was_written_is_read_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("an empty folder");
        assert!(Store::open(folder.path()).is_err(), "the second process is refused");
        let mut deployment = Deployment::default();
        let component = ComponentRef::Digest("sha256:ab".into());
        let desired = Desired { component, config: "{}".into(), ..Desired::default() };
        let planned = deployment.plan(SlotName::Router, desired).expect("no condition");
        let document = deployment.published(planned, "r@1+ab".into());
        store.write_slot(&document).expect("a writable folder");
        fs::write(folder.path().join("slots/scheduler.json"), "{").expect("a broken document");
        let mut aliases = pointsman_control::Aliases::default();
        for alias in ["demo", "org/model:1", "../slots/router"] {
            let weights = [(format!("{alias}:f16"), 1)].into();
            let desired = DesiredAlias { weights, sticky: Sticky::Tenant, if_generation: None };
            let document = aliases.plan(alias, desired).expect("good weights");
            store.write_alias(&document).expect("a writable folder");
            aliases.put(document);
        }
        let mut restored = pointsman_control::Aliases::default();
        store.alias_documents().into_iter().for_each(|document| restored.put(document.expect("just written")));
        assert_eq!(restored, aliases);
        let documents = store.slot_documents();
        assert_eq!(documents[0].1.as_ref().ok(), Some(&document));
        assert_eq!(documents[1].0, SlotName::Scheduler);
        assert!(documents[1].1.as_ref().is_err_and(|e| e.why.contains("scheduler.json")), "{documents:?}");
        store.write_component("sha256:ab", b"wasm").expect("a writable folder");
        fs::write(store.component_path("sha256:ab"), b"wa").expect("a damaged file");
        store.write_component("sha256:ab", b"wasm").expect("a writable folder");
        assert_eq!(store.read_component("sha256:ab").expect("just written"), b"wasm");
        let signature = Signature::parse(&[7; 64]).expect("64 bytes");
        store.write_signature("sha256:ab", signature).expect("a writable folder");
        assert_eq!(store.read_signature("sha256:ab"), Some(signature));
        assert_eq!(store.component_digests(), ["sha256:ab"]);
        assert!(store.delete_component("sha256:ab").and_then(|()| store.delete_component("sha256:ab")).is_ok());
        assert_eq!(store.read_signature("sha256:ab"), None);
    }

    #[test]
    fn a_start_sweeps_signatures_of_nothing_and_no_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let signature = Signature::parse(&[7; 64]).expect("64 bytes");
        // What a crash has left, with a component or without.
        for (with_component, is_kept) in [(true, true), (false, false)] {
            let store = Store::open(folder.path()).expect("a folder");
            store.write_signature("sha256:ab", signature).expect("a writable folder");
            if with_component {
                store.write_component("sha256:ab", b"wasm").expect("a writable folder");
            } else {
                fs::remove_file(store.component_path("sha256:ab")).expect("written before");
            }
            drop(store);
            let store = Store::open(folder.path()).expect("a folder");
            assert_eq!(store.read_signature("sha256:ab").is_some(), is_kept);
            assert_eq!(store.has_component("sha256:ab"), with_component);
        }
    }

    #[test]
    fn what_could_not_be_made_to_last_is_as_it_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("document.json");
        let fails = |_: &Path| Err(io::Error::from(io::ErrorKind::StorageFull));
        for before in [None, Some(&b"old"[..])] {
            for new in [None, Some(&b"new"[..])] {
                place(&path, before, sync_folder).expect("a writable folder");
                assert!(place(&path, new, fails).is_err_and(|error| error.kind() == io::ErrorKind::StorageFull));
                assert_eq!(fs::read(&path).ok().as_deref(), before, "{new:?}");
                place(&path, new, sync_folder).expect("a writable folder");
                assert_eq!(fs::read(&path).ok().as_deref(), new, "{before:?}");
            }
        }
        assert!(fs::read_dir(folder.path()).expect("a folder").count() <= 1, "nothing is left aside");
    }

    #[test]
    fn what_cannot_be_read_can_be_replaced_and_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("document.json");
        for new in [None, Some(&b"new"[..])] {
            std::os::unix::fs::symlink(&path, &path).expect("a link to itself");
            assert!(fs::read(&path).is_err_and(|error| error.kind() != io::ErrorKind::NotFound));
            place(&path, new, sync_folder).expect("a writable folder");
            assert_eq!(fs::read(&path).ok().as_deref(), new);
        }
    }

    #[test]
    fn the_journal_goes_on_after_it_was_moved_aside_in_vain() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("an empty folder");
        let path = folder.path().join("journal.jsonl");
        let full = OpenOptions::new().write(true).open(&path).expect("a journal");
        full.set_len(JOURNAL_BYTES + 1).expect("a large file");
        // As if there had been no file descriptor left for the next one.
        fs::rename(&path, folder.path().join("journal.1.jsonl")).expect("moved aside");
        for sequence in [1, 2] {
            let what = Happened::Deleted { digest: "x".into() };
            store.append_journal(Entry { sequence, at_unix_ms: 5, actor: "t".into(), what }.to_json());
        }
        assert_eq!(store.journal_tail().iter().map(|e| e.sequence).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn lines_wait_for_a_disk_that_takes_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("an empty folder");
        let append = |sequence: u64| {
            let what = Happened::Deleted { digest: "x".into() };
            store.append_journal(Entry { sequence, at_unix_ms: 5, actor: "t".into(), what }.to_json());
        };
        let swap = |file: File| std::mem::replace(&mut store.journal.lock().expect("unpoisoned").file, file);
        let numbers = || store.journal_tail().iter().map(|entry| entry.sequence).collect::<Vec<_>>();
        append(1);
        let file = swap(OpenOptions::new().append(true).open("/dev/full").expect("Linux has one"));
        (2..4).for_each(append);
        assert_eq!(numbers(), [1]);
        let full = swap(file);
        append(4);
        assert_eq!(numbers(), [1, 2, 3, 4]);
        drop(swap(full));
        (5..2_000).for_each(append);
        assert_eq!(store.journal.lock().expect("unpoisoned").waiting.len(), MAX_WAITING_LINES);
    }

    #[test]
    fn the_journal_survives_a_torn_line_and_a_cut_in_the_middle_of_a_letter() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("journal.jsonl");
        let line = |sequence: u64, digest: &str| {
            let what = Happened::Deleted { digest: digest.to_owned() };
            Entry { sequence, at_unix_ms: 5, actor: "t".into(), what }.to_json()
        };
        // So many two-byte letters, one byte off, that the tail begins inside one of them.
        let long = "\u{e9}".repeat(400_000);
        fs::write(&path, format!("{}\n{}\n{}\n{{\"sequence\":9", line(1, &long), line(2, &long), line(3, "c")))
            .expect("written");
        let store = Store::open(folder.path()).expect("a folder with a journal");
        store.append_journal(line(4, "d"));
        let numbers: Vec<u64> = store.journal_tail().iter().map(|e| e.sequence).collect();
        assert_eq!(numbers, [2, 3, 4]);
        fs::rename(&path, folder.path().join("journal.1.jsonl")).expect("moved aside");
        for (newer, expect) in [("", &[2, 3, 4][..]), (&*line(5, "e"), &[2, 3, 4, 5]), (&*line(6, &long), &[3, 4, 6])] {
            fs::write(&path, newer).expect("a new file");
            let numbers: Vec<u64> = store.journal_tail().iter().map(|e| e.sequence).collect();
            assert_eq!(numbers, expect, "the older file goes on before the newer one");
        }
    }
}
