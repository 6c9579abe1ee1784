//! `speculative_config`, with the names that vLLM gives its members: which drafts a request wants, and whether its model has them.
//!
//! Read with the other fields, checked once the model is known: whether there is a draft model is the operator's choice for each.
//! A row of a router that has none, such as one on a GPU, serves the request without drafts: the answer is the same.

use pointsman_sched::draft::{DraftMethod, MAX_DRAFTS};

use super::fields::Fields;
use crate::dispatch::Target;
use crate::error::ApiError;
use crate::ports::Variant;

const FIELD: &str = "speculative_config";
/// Draft tokens of a step where a request asks for drafts and not for how many.
const DEFAULT_DRAFTS: u32 = 5;

/// The drafts that a request wants.
#[derive(Clone, Debug, Default)]
pub(crate) struct Speculation {
    /// Of a step; 0 for none.
    pub(crate) tokens: u32,
    /// How they are found; `None` for the draft model where there is one.
    method: Option<DraftMethod>,
    /// The draft model, by name.
    model: Option<String>,
}

impl Speculation {
    /// Reads the field; without it there are so many.
    pub(super) fn parse(fields: &mut Fields, default: u32) -> Result<Self, ApiError> {
        let Some(config) = fields.take(FIELD) else { return Ok(Self { tokens: default, ..Self::default() }) };
        let mut config = Fields::of(FIELD, config)?;
        let method = match config.string("method")?.as_deref() {
            None => None,
            Some("ngram") => Some(DraftMethod::Ngram),
            Some("draft_model") => Some(DraftMethod::Model),
            Some(other) => {
                let what = format!("`{FIELD}.method` \"{other}\" (\"ngram\" and \"draft_model\" are)");
                return Err(ApiError::unsupported(config.param("method"), what));
            }
        };
        let model = config.string("model")?;
        if model.is_some() && method == Some(DraftMethod::Ngram) {
            let problem = format!("`{FIELD}.model` is for the method \"draft_model\"; leave it out, or the method");
            return Err(ApiError::invalid(config.param("model"), problem));
        }
        let tokens = config.u32("num_speculative_tokens", 0..=MAX_DRAFTS)?.unwrap_or(DEFAULT_DRAFTS);
        Ok(Self { tokens, method: method.or(model.as_ref().map(|_| DraftMethod::Model)), model })
    }

    /// Whether the model has the draft model that is asked for by name or method. Upstreams are asked for no drafts.
    pub(super) fn check(&self, target: &Target) -> Result<(), ApiError> {
        if self.method != Some(DraftMethod::Model) || self.tokens == 0 || target.has_upstreams() {
            return Ok(());
        }
        let mut own = target.variants.iter().filter_map(|variant| variant.draft_model.as_deref()).peekable();
        let Some(&first) = own.peek() else {
            let problem = format!(
                "`{}` has no draft model: the operator names one in [draft_models]; use the method \"ngram\", or leave \
                 `{FIELD}` out",
                target.name
            );
            return Err(ApiError::invalid(format!("{FIELD}.method"), problem));
        };
        match &self.model {
            Some(model) if own.all(|own| own != model) => {
                let problem = format!(
                    "`{FIELD}.model` must be the draft model of `{}`, `{first}`, found `{model}`; leave it out",
                    target.name
                );
                Err(ApiError::invalid(format!("{FIELD}.model"), problem))
            }
            _ => Ok(()),
        }
    }

    /// How drafts are found on this variant.
    pub(crate) fn method_on(&self, variant: &Variant) -> DraftMethod {
        let own = if variant.draft_model.is_some() { DraftMethod::Model } else { DraftMethod::Ngram };
        self.method.unwrap_or(own)
    }
}
