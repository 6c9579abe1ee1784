//! The stored form of what was loaded while the host ran: a list of names and paths, loaded again at the next start.
//!
//! One document for all of them and not one for each: they are few, and a start needs them together. Models of the configuration
//! are not in it, because the configuration is what brings those back.

use serde::{Deserialize, Serialize};

use crate::deployment::{DocumentError, stored};

/// Models that were loaded while the host ran, in the order in which they were.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelsDocument {
    /// Version of this layout: 1.
    pub format: u32,
    /// One of a name.
    pub models: Vec<LoadedModel>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadedModel {
    /// As in `llama`, or `llama:v2` for a variant of it.
    pub name: String,
    /// Folder or file, absolute.
    pub path: String,
}

impl ModelsDocument {
    /// One with nothing in it.
    #[must_use]
    pub fn empty() -> Self {
        Self { format: 1, models: Vec::new() }
    }

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

    /// The same with one more, which takes the place of another of its name.
    #[must_use]
    pub fn with(&self, model: LoadedModel) -> Self {
        let mut next = self.without(&model.name);
        next.models.push(model);
        next
    }

    /// The same without one.
    #[must_use]
    pub fn without(&self, name: &str) -> Self {
        let models = self.models.iter().filter(|model| model.name != name).cloned().collect();
        Self { format: self.format, models }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_back_and_newer_ones_are_refused() {
        let model = |name: &str, path: &str| LoadedModel { name: name.into(), path: path.into() };
        let document = ModelsDocument::empty().with(model("a", "/a")).with(model("b:v2", "/b")).with(model("a", "/c"));
        assert_eq!(document.models, [model("b:v2", "/b"), model("a", "/c")]);
        assert_eq!(document.without("a").without("x").models, [model("b:v2", "/b")]);
        let json = document.to_json();
        assert_eq!(ModelsDocument::parse(json.as_bytes()).expect("its own"), document);
        let newer = json.replace("\"format\": 1", "\"format\": 2");
        assert!(matches!(ModelsDocument::parse(newer.as_bytes()), Err(DocumentError::Format { found: 2 })));
    }
}
