//! What is done without a document of its own (components come, are signed and go; safe mode), and its line in the journal.
//!
//! A slot's document says where the journal was when it was stored, so that a start can tell whether its line is missing. A
//! component or the removal of a file cannot say that: what is about to be done is stored first, and a start that finds it looks
//! whether it was done. Writing the line first would be simpler, and a journal that tells of what never happened is worse than
//! none.
//!
//! A full disk must not stand in the way of what frees it, nor of the switch that takes policies out: a deletion and safe mode are
//! done all the same where they cannot be written down first. A host that dies between such a deed and its line comes back
//! with the deed done and without its line; nothing else is lost.

use std::io;

use pointsman_control::{Happened, Intent};
use pointsman_policy::Digest;

use super::{Deploy, lock};

impl Deploy {
    /// Does something and journals it. The caller holds `operations`.
    ///
    /// # Errors
    /// It fails, or the disk does not take what is about to be done, and that is no rescue; there is no line then.
    pub(super) fn deed(&self, actor: &str, what: Happened, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let intent = Intent { format: 1, journal_before: self.last_line(), actor: actor.to_owned(), what };
        let intended = match self.store.write_intent(&intent) {
            Err(error) if is_rescue(&intent.what) => {
                tracing::warn!(
                    "done without being written down first, and without a line if the host dies now: {error}"
                );
                Ok(())
            }
            intended => intended,
        };
        let done = intended.and_then(|()| act());
        if done.is_ok() {
            self.note(actor, intent.what);
        }
        self.store.forget_intent();
        done
    }

    /// Writes the line of what was being done when the host died, if it was done. At the start, under `operations`.
    pub(super) fn recall_deed(&self) {
        let Some(intent) = self.store.read_intent() else { return };
        let lacks = {
            let mut journal = lock(&self.journal);
            journal.go_on_after(intent.journal_before);
            journal.lacks(&intent)
        };
        if let Some(what) = lacks.then(|| self.done(intent.what)).flatten() {
            self.note(&intent.actor, what);
        }
        self.store.forget_intent();
    }

    /// Its line, as far as it was done.
    fn done(&self, what: Happened) -> Option<Happened> {
        let signer = |digest: &str| {
            let signature = self.store.read_signature(digest)?;
            self.trust.signer(digest, &signature).map(str::to_owned)
        };
        let is_done = match &what {
            Happened::Uploaded { digest, .. } => self.is_intact(digest),
            Happened::Signed { digest, signed_by } => signer(digest).as_ref() == Some(signed_by),
            Happened::Deleted { digest } => !self.store.has_component(digest),
            Happened::SafeMode { on, .. } => self.store.read_safe_mode().is_some() == *on,
            _ => false,
        };
        let as_it_is = match what {
            // An older host stored the signature after its component.
            Happened::Uploaded { digest, world, size, source, .. } => {
                let signed_by = signer(&digest);
                Happened::Uploaded { digest, world, size, signed_by, source }
            }
            what => what,
        };
        is_done.then_some(as_it_is)
    }

    /// Whether a component is kept as it was uploaded, and not as a damaged file that was about to be replaced.
    fn is_intact(&self, digest: &str) -> bool {
        self.store.read_component(digest).is_ok_and(|bytes| Digest::of(&bytes).as_str() == digest)
    }
}

/// Whether it must work on a full disk.
fn is_rescue(what: &Happened) -> bool {
    matches!(what, Happened::Deleted { .. } | Happened::SafeMode { .. })
}
