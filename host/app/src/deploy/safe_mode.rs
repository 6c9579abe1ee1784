//! The one switch that makes every slot native while the host runs, and back.
//!
//! Rollouts are paused, because their arms cannot be told apart any more; whoever switches off resumes them by hand.
//! Deployments go on underneath: what is activated meanwhile is stored and kept warm, and answers once the switch is off. So
//! an operator in trouble switches off first and repairs then. `--safe-mode` at the start is the stronger form: nothing of a
//! guest is even instantiated.

use std::io;

use pointsman_control::{Happened, SafeModeDocument};
use pointsman_server::admin::wire;
use pointsman_server::ports::AdminError;

use super::errors::{conflict, internal};
use super::{Deploy, lock};

/// What the file says when it cannot be read: the switch was on, and nobody knows why.
const UNREADABLE: &str = "its document cannot be read";

impl Deploy {
    /// Takes the switch as the last life of the host left it; before anything is published.
    pub(super) fn recall_safe_mode(&self) {
        let Some(found) = self.store.read_safe_mode() else { return };
        let document = found.unwrap_or_else(|error| {
            tracing::error!("safe-mode.json cannot be read, so safe mode is on: {error}");
            let (reason, since_unix_ms) = (Some(UNREADABLE.to_owned()), self.clock.unix_millis());
            SafeModeDocument { format: 1, reason, actor: "startup".into(), since_unix_ms }
        });
        let reason = document.reason.as_deref().unwrap_or("no reason given");
        tracing::warn!("safe mode is on since before this start ({reason}); `pointsman policy safe-mode off` ends it");
        self.bypass(Some(document));
    }

    /// Everything that follows from the switch but its document.
    fn bypass(&self, switched: Option<SafeModeDocument>) {
        self.runtime.bypass(switched.is_some());
        self.metrics.safe_mode(self.safe_mode || switched.is_some());
        *lock(&self.switched) = switched;
    }

    /// Why every slot is native; `None` when guests may answer.
    pub(crate) fn safe_reason(&self) -> Option<String> {
        if self.safe_mode {
            return Some("safe mode since the start".to_owned());
        }
        let switched = lock(&self.switched);
        switched.as_ref().map(|d| format!("safe mode: {}", d.reason.as_deref().unwrap_or("no reason given")))
    }

    pub(super) fn safe_mode_view(&self) -> wire::SafeMode {
        let switched = lock(&self.switched).clone();
        wire::SafeMode {
            on: self.safe_mode || switched.is_some(),
            since_start: self.safe_mode,
            reason: switched.as_ref().and_then(|d| d.reason.clone()),
            by: switched.as_ref().map(|d| d.actor.clone()),
            since_unix_ms: switched.map(|d| d.since_unix_ms),
        }
    }

    /// Switches. On: guests are off first, whatever the disk says. Off: the document goes first, so that a crash in between
    /// leaves the switch off as asked. Asking for what is the case already changes nothing, but stores what the disk has refused.
    pub(super) fn switch_safe_mode(&self, put: wire::PutSafeMode, actor: &str) -> Result<wire::SafeMode, AdminError> {
        let wire::PutSafeMode { on, reason } = put;
        if on && !self.safe_mode {
            // Guests are off whoever holds the lock, such as a compilation; the rest follows under it.
            self.runtime.bypass(true);
        }
        let _one = lock(&self.operations);
        if self.safe_mode {
            let message = "the host was started in safe mode and runs no policies; restart it without --safe-mode";
            return Err(conflict(message.to_owned()));
        }
        let switched = lock(&self.switched).clone();
        match (on, switched) {
            (true, Some(document)) => self.keep_safe_mode(&document)?,
            (true, None) => self.enter_safe_mode(reason, actor)?,
            (false, Some(_)) => {
                let remove = || self.store.write_safe_mode(None);
                self.deed(actor, Happened::SafeMode { on, reason }, remove).map_err(|e| {
                    let remedy = "mend the permissions or the disk of the data directory, and switch it off again";
                    internal(format!("safe mode stays on: its document cannot be removed ({e}); {remedy}"))
                })?;
                self.bypass(None);
            }
            (false, None) => {}
        }
        Ok(self.safe_mode_view())
    }

    fn enter_safe_mode(&self, reason: Option<String>, actor: &str) -> Result<(), AdminError> {
        let (actor, since_unix_ms) = (actor.to_owned(), self.clock.unix_millis());
        let document = SafeModeDocument { format: 1, reason: reason.clone(), actor, since_unix_ms };
        self.bypass(Some(document.clone()));
        self.pause_rollouts(&document.actor);
        let happened = Happened::SafeMode { on: true, reason };
        let stored = self.deed(&document.actor, happened.clone(), || self.store.write_safe_mode(Some(&document)));
        stored.map_err(|error| {
            // It is on all the same.
            self.note(&document.actor, happened);
            unsaved(&error)
        })
    }

    /// Stores a switch that is on, where the disk has refused it.
    fn keep_safe_mode(&self, document: &SafeModeDocument) -> Result<(), AdminError> {
        match self.store.read_safe_mode() {
            Some(Ok(_)) => Ok(()),
            _ => self.store.write_safe_mode(Some(document)).map_err(|error| unsaved(&error)),
        }
    }
}

fn unsaved(error: &io::Error) -> AdminError {
    internal(format!(
        "safe mode is on, and a restart would end it: it cannot be stored ({error}); make room in the data directory, or mend its \
         permissions, and switch it on again"
    ))
}
