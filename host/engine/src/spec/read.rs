//! Fields of a `config.json`, each with a name for what is wrong with it.

use serde_json::{Map, Value};

/// Why a `config.json` cannot be served. The model, or this version of the host, is at fault; a retry does not help.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON.
    #[error("config.json is not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A field that must be there is not.
    #[error("config.json lacks {field}; it must be {expected}")]
    Missing {
        /// Its name.
        field: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// A field has the wrong type or an impossible value.
    #[error("config.json has {field} = {found}; it must be {expected}")]
    Invalid {
        /// Its name.
        field: &'static str,
        /// What it is.
        found: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A field asks for something that is not implemented.
    #[error("config.json has {field} = {found}, which is not supported; supported: {supported}")]
    Unsupported {
        /// Its name.
        field: &'static str,
        /// What it is.
        found: String,
        /// What works.
        supported: &'static str,
    },
    /// A file beside `config.json` cannot be read.
    #[error("cannot read {file}: {source}")]
    Read {
        /// Its name.
        file: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the sentence-transformers library is not what it should be.
    #[error("{file} cannot be understood: {source}")]
    SentenceJson {
        /// Its name.
        file: &'static str,
        /// Where it breaks.
        source: serde_json::Error,
    },
    /// A file of the sentence-transformers library asks for something that is not implemented.
    #[error("{file} has {found}, which is not supported; supported: {supported}")]
    Sentence {
        /// Its name.
        file: &'static str,
        /// What it has.
        found: String,
        /// What works.
        supported: &'static str,
    },
}

/// Upper bound of every size, so that products of sizes cannot overflow.
const MAX_SIZE: u64 = 1 << 24;

/// The fields of a `config.json`.
#[derive(Debug)]
pub(super) struct Fields(Map<String, Value>);

pub(super) fn unsupported(field: &'static str, found: String, supported: &'static str) -> SpecError {
    SpecError::Unsupported { field, found, supported }
}

impl Fields {
    pub(super) fn parse(json: &[u8]) -> Result<Self, SpecError> {
        Ok(Self(serde_json::from_slice(json)?))
    }

    /// The field, unless it is absent or null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    /// Refuses every value that `accept` does not know. An absent field is accepted.
    pub(super) fn only(
        &self,
        field: &'static str,
        supported: &'static str,
        accept: impl Fn(&Value) -> bool,
    ) -> Result<(), SpecError> {
        match self.get(field) {
            Some(found) if !accept(found) => Err(unsupported(field, found.to_string(), supported)),
            _ => Ok(()),
        }
    }

    pub(super) fn size(&self, field: &'static str) -> Result<usize, SpecError> {
        let expected = "a whole number from 1 to 2^24";
        self.size_or_none(field)?.ok_or(SpecError::Missing { field, expected })
    }

    pub(super) fn size_or(&self, field: &'static str, default: usize) -> Result<usize, SpecError> {
        Ok(self.size_or_none(field)?.unwrap_or(default))
    }

    pub(super) fn size_or_none(&self, field: &'static str) -> Result<Option<usize>, SpecError> {
        let expected = "a whole number from 1 to 2^24";
        let read = |found: &Value| match found.as_u64() {
            Some(size @ 1..=MAX_SIZE) => Ok(size as usize),
            _ => Err(SpecError::Invalid { field, found: found.to_string(), expected }),
        };
        self.get(field).map(read).transpose()
    }

    /// A whole number that may be 0.
    pub(super) fn count_or(&self, field: &'static str, default: usize) -> Result<usize, SpecError> {
        let expected = "a whole number up to 2^24";
        match self.get(field).map(|found| (found, found.as_u64())) {
            None => Ok(default),
            Some((_, Some(count @ 0..=MAX_SIZE))) => Ok(count as usize),
            Some((found, _)) => Err(SpecError::Invalid { field, found: found.to_string(), expected }),
        }
    }

    pub(super) fn positive_or_none(&self, field: &'static str) -> Result<Option<f64>, SpecError> {
        self.get(field).map(|found| positive(field, found)).transpose()
    }

    pub(super) fn flag_or(&self, field: &'static str, default: bool) -> Result<bool, SpecError> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(found) => Err(SpecError::Invalid { field, found: found.to_string(), expected: "true or false" }),
        }
    }

    /// A list of names, one for each of `n` layers.
    pub(super) fn names(&self, field: &'static str, n: usize) -> Result<Option<Vec<&str>>, SpecError> {
        let expected = "a list with one name per layer";
        match self.get(field).map(|found| (found, names_of(found))) {
            None => Ok(None),
            Some((_, Some(names))) if names.len() == n => Ok(Some(names)),
            Some((found, _)) => Err(SpecError::Invalid { field, found: found.to_string(), expected }),
        }
    }
}

fn names_of(list: &Value) -> Option<Vec<&str>> {
    list.as_array()?.iter().map(Value::as_str).collect()
}

/// A number above 0.
pub(super) fn positive(field: &'static str, found: &Value) -> Result<f64, SpecError> {
    let invalid = || SpecError::Invalid { field, found: found.to_string(), expected: "a positive number" };
    found.as_f64().filter(|x| *x > 0.0).ok_or_else(invalid)
}
