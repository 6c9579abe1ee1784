//! Fields of a `config.json`, each with a name for what is wrong with it.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::load::LoadError;

/// Why a model cannot be served as it describes itself. The model, or this version of the host, is at fault; a retry does not help.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON.
    #[error("config.json is not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A field of `config.json` does not do.
    #[error("config.json {0}")]
    Config(#[from] FieldError),
    /// A value of a GGUF file's metadata does not do.
    #[error("the file's metadata {0}")]
    Metadata(FieldError),
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
    /// A tensor that says how positions are stretched does not do.
    #[error(transparent)]
    Tensor(#[from] LoadError),
}

/// What is wrong with a field.
#[derive(Debug, thiserror::Error)]
pub enum FieldError {
    /// It must be there and is not.
    #[error("lacks {field}; it must be {expected}")]
    Missing {
        /// Its name.
        field: Cow<'static, str>,
        /// What it must be.
        expected: &'static str,
    },
    /// It has the wrong type or an impossible value.
    #[error("has {field} = {found}; it must be {expected}")]
    Invalid {
        /// Its name.
        field: Cow<'static, str>,
        /// What it is.
        found: String,
        /// What it must be.
        expected: &'static str,
    },
    /// It asks for something that is not implemented.
    #[error("has {field} = {found}, which is not supported; supported: {supported}")]
    Unsupported {
        /// Its name.
        field: Cow<'static, str>,
        /// What it is.
        found: String,
        /// What works.
        supported: &'static str,
    },
}

/// Upper bound of every size, so that products of sizes cannot overflow.
const MAX_SIZE: u64 = 1 << 24;

/// The fields of a `config.json`, or what stands for them elsewhere.
#[derive(Debug)]
pub(super) struct Fields(pub(super) Map<String, Value>);

pub(super) fn missing(field: &'static str, expected: &'static str) -> FieldError {
    FieldError::Missing { field: field.into(), expected }
}

pub(super) fn invalid(field: &'static str, found: impl ToString, expected: &'static str) -> FieldError {
    FieldError::Invalid { field: field.into(), found: found.to_string(), expected }
}

pub(super) fn unsupported(field: &'static str, found: impl ToString, supported: &'static str) -> FieldError {
    FieldError::Unsupported { field: field.into(), found: found.to_string(), supported }
}

impl FieldError {
    /// The same of a field that is called otherwise where it was read.
    pub(super) fn renamed(mut self, name: impl FnOnce(&str) -> Option<String>) -> Self {
        let (Self::Missing { field, .. } | Self::Invalid { field, .. } | Self::Unsupported { field, .. }) = &mut self;
        if let Some(name) = name(field) {
            *field = name.into();
        }
        self
    }
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
    ) -> Result<(), FieldError> {
        match self.get(field) {
            Some(found) if !accept(found) => Err(unsupported(field, found, supported)),
            _ => Ok(()),
        }
    }

    pub(super) fn size(&self, field: &'static str) -> Result<usize, FieldError> {
        let expected = "a whole number from 1 to 2^24";
        self.size_or_none(field)?.ok_or(missing(field, expected))
    }

    pub(super) fn size_or(&self, field: &'static str, default: usize) -> Result<usize, FieldError> {
        Ok(self.size_or_none(field)?.unwrap_or(default))
    }

    pub(super) fn size_or_none(&self, field: &'static str) -> Result<Option<usize>, FieldError> {
        let expected = "a whole number from 1 to 2^24";
        let read = |found: &Value| match found.as_u64() {
            Some(size @ 1..=MAX_SIZE) => Ok(size as usize),
            _ => Err(invalid(field, found, expected)),
        };
        self.get(field).map(read).transpose()
    }

    /// A whole number that may be 0.
    pub(super) fn count_or(&self, field: &'static str, default: usize) -> Result<usize, FieldError> {
        let expected = "a whole number up to 2^24";
        match self.get(field).map(|found| (found, found.as_u64())) {
            None => Ok(default),
            Some((_, Some(count @ 0..=MAX_SIZE))) => Ok(count as usize),
            Some((found, _)) => Err(invalid(field, found, expected)),
        }
    }

    pub(super) fn positive_or_none(&self, field: &'static str) -> Result<Option<f64>, FieldError> {
        self.get(field).map(|found| positive(field, found)).transpose()
    }

    pub(super) fn flag_or(&self, field: &'static str, default: bool) -> Result<bool, FieldError> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(found) => Err(invalid(field, found, "true or false")),
        }
    }

    /// A list of names, one for each of `n` layers.
    pub(super) fn names(&self, field: &'static str, n: usize) -> Result<Option<Vec<&str>>, FieldError> {
        let expected = "a list with one name per layer";
        match self.get(field).map(|found| (found, names_of(found))) {
            None => Ok(None),
            Some((_, Some(names))) if names.len() == n => Ok(Some(names)),
            Some((found, _)) => Err(invalid(field, found, expected)),
        }
    }
}

fn names_of(list: &Value) -> Option<Vec<&str>> {
    list.as_array()?.iter().map(Value::as_str).collect()
}

/// A number above 0.
pub(super) fn positive(field: &'static str, found: &Value) -> Result<f64, FieldError> {
    let invalid = || invalid(field, found, "a positive number");
    found.as_f64().filter(|x| *x > 0.0).ok_or_else(invalid)
}
