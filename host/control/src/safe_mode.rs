//! The stored form of the switch that makes every slot native while the host runs.
//!
//! A document of its own beside those of the slots, which it leaves as they are: a host that dies with the switch on comes back
//! with it on, and switching it off brings back what the slots say.

use serde::{Deserialize, Serialize};

use crate::deployment::{DocumentError, stored};
use crate::journal::Actor;

/// Who switched policies off, when and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SafeModeDocument {
    /// Version of this layout: 1.
    pub format: u32,
    /// In the operator's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Who asked.
    pub actor: Actor,
    /// Milliseconds since 1970.
    pub since_unix_ms: u64,
}

impl SafeModeDocument {
    /// Reads a stored document.
    ///
    /// # Errors
    /// It is not one, or a newer host wrote it.
    pub fn parse(json: &[u8]) -> Result<Self, DocumentError> {
        let document: Self = serde_json::from_slice(json)?;
        DocumentError::check(document.format).map(|()| document)
    }

    /// Its stored form.
    #[must_use]
    pub fn to_json(&self) -> String {
        stored(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_back_and_newer_ones_are_refused() {
        for reason in [None, Some("the router loops".to_owned())] {
            let document = SafeModeDocument { format: 1, reason, actor: "ci@10.0.0.7".into(), since_unix_ms: 7 };
            let json = document.to_json();
            assert_eq!(SafeModeDocument::parse(json.as_bytes()).expect("its own"), document);
            let newer = json.replace("\"format\": 1", "\"format\": 2");
            assert!(matches!(SafeModeDocument::parse(newer.as_bytes()), Err(DocumentError::Format { found: 2 })));
        }
    }
}
