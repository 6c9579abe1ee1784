//! What distinguishes one sentence encoder from another, as data: its `config.json`, and the files that the
//! sentence-transformers library puts beside it.
//!
//! Not a [`ModelSpec`](super::ModelSpec): an encoder norms after each half, adds learned positions, sees both ways and has no
//! tokens to choose, so there is little to share but the products. A field that would silently change the vectors is an
//! error here.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::read::{FieldError, Fields, SpecError, invalid, unsupported};

/// A BERT: learned positions, LayerNorm after each half, attention both ways, biases everywhere; and how its last hidden
/// states become one vector.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderSpec {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream, and of a vector.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// Width of the feed-forward half.
    pub ffn: usize,
    /// Token types that the checkpoint has; a text is the first of them.
    pub types: usize,
    /// Rows of the table of positions.
    pub positions: usize,
    /// Row of the first token.
    pub first_position: usize,
    /// Added to the variance in LayerNorm.
    pub norm_eps: f32,
    /// Whether GELU is its tanh form.
    pub gelu_tanh: bool,
    /// Tokens that a text may have.
    pub max_tokens: usize,
    /// How the last hidden states become one.
    pub pooling: Pooling,
    /// Whether a vector is made to have length 1.
    pub normalised: bool,
}

/// How the hidden states of a text become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// That of the first token.
    First,
    /// Their mean.
    Mean,
}

/// Architectures of this structure, with what `config.json` calls them.
const FAMILIES: [&str; 3] = ["BertModel", "RobertaModel", "XLMRobertaModel"];

/// `modules.json`: what comes after the transformer.
#[derive(Deserialize)]
struct Module {
    r#type: String,
    path: String,
}

#[derive(Deserialize)]
struct SentenceConfig {
    max_seq_length: Option<usize>,
    #[serde(default)]
    do_lower_case: bool,
}

// === impl EncoderSpec ===

impl EncoderSpec {
    /// Whether a `config.json` is an encoder's.
    #[must_use]
    pub fn describes(config: &[u8]) -> bool {
        Fields::parse(config).is_ok_and(|fields| family(&fields).is_some())
    }

    /// Reads a folder in Hugging Face format. Without sentence-transformers' files, a vector is the mean of the hidden states,
    /// made to have length 1.
    ///
    /// # Errors
    /// The first field that is missing, impossible or not supported, with its file.
    pub fn open(folder: &Path) -> Result<Self, SpecError> {
        let config = read(folder, "config.json")?.unwrap_or_default();
        let mut spec = from_config(&Fields::parse(&config)?)?;
        if let Some(modules) = parse::<Vec<Module>>(folder, "modules.json")? {
            (spec.pooling, spec.normalised) = after(folder, &modules)?;
        }
        if let Some(sentence) = parse::<SentenceConfig>(folder, SENTENCE)? {
            if sentence.do_lower_case {
                return Err(file(SENTENCE, "do_lower_case = true", "false: let the tokenizer's normalizer do it"));
            }
            spec.max_tokens = sentence.max_seq_length.unwrap_or(spec.max_tokens).clamp(1, spec.max_tokens);
        }
        Ok(spec.checked()?)
    }

    /// Checks that the kernels can serve these sizes.
    fn checked(self) -> Result<Self, FieldError> {
        let sizes = [("hidden_size", self.hidden), ("intermediate_size", self.ffn)];
        if let Some((field, found)) = sizes.into_iter().find(|(_, size)| !size.is_multiple_of(32)) {
            return Err(unsupported(field, found.to_string(), "multiples of 32"));
        }
        if !self.hidden.is_multiple_of(16 * self.heads) {
            let supported = "a divisor of hidden_size whose heads are a multiple of 16 wide";
            return Err(unsupported("num_attention_heads", self.heads.to_string(), supported));
        }
        Ok(self)
    }

    /// Width of a head.
    pub(crate) fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }
}

const SENTENCE: &str = "sentence_bert_config.json";

fn family(fields: &Fields) -> Option<&'static str> {
    let named = fields.get("architectures")?.as_array()?;
    FAMILIES.into_iter().find(|family| named.iter().any(|name| name == family))
}

fn from_config(fields: &Fields) -> Result<EncoderSpec, FieldError> {
    const ACTIVATIONS: &str = "gelu, gelu_new, gelu_pytorch_tanh";
    fields.only("position_embedding_type", "absolute", |kind| kind == "absolute")?;
    fields.only("is_decoder", "false", |is| is == &Value::Bool(false))?;
    fields.only("quantization_config", "null: F32, F16 or BF16 weights", |_| false)?;
    let gelu_tanh = match fields.get("hidden_act").map(|name| (name, name.as_str())) {
        None | Some((_, Some("gelu"))) => false,
        Some((_, Some("gelu_new" | "gelu_pytorch_tanh"))) => true,
        Some((found, _)) => return Err(unsupported("hidden_act", found.to_string(), ACTIVATIONS)),
    };
    let positions = fields.size("max_position_embeddings")?;
    // RoBERTa counts positions from the one after its padding token.
    let first_position = match family(fields) {
        Some("BertModel") | None => 0,
        Some(_) => fields.count_or("pad_token_id", 1)? + 1,
    };
    if first_position >= positions {
        let expected = "more than pad_token_id + 1";
        return Err(invalid("max_position_embeddings", positions, expected));
    }
    Ok(EncoderSpec {
        vocab: fields.size("vocab_size")?,
        hidden: fields.size("hidden_size")?,
        layers: fields.size("num_hidden_layers")?,
        heads: fields.size("num_attention_heads")?,
        ffn: fields.size("intermediate_size")?,
        types: fields.size_or("type_vocab_size", 2)?,
        positions,
        first_position,
        norm_eps: fields.positive_or_none("layer_norm_eps")?.unwrap_or(1e-12) as f32,
        gelu_tanh,
        max_tokens: positions - first_position,
        pooling: Pooling::Mean,
        normalised: true,
    })
}

/// What the modules after the transformer come to.
fn after(folder: &Path, modules: &[Module]) -> Result<(Pooling, bool), SpecError> {
    const MODULES: &str = "modules.json";
    let kind = |module: &Module| module.r#type.rsplit('.').next().unwrap_or_default().to_owned();
    let kinds: Vec<String> = modules.iter().map(kind).collect();
    let normalised = match kinds.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["Transformer", "Pooling"] => false,
        ["Transformer", "Pooling", "Normalize"] => true,
        _ => return Err(file(MODULES, &kinds.join(", "), "Transformer, Pooling and, if wanted, Normalize")),
    };
    let path = &modules[1].path;
    if Path::new(path).file_name().is_none_or(|name| name != path.as_str()) {
        return Err(file(MODULES, &format!("the path {path:?}"), "a plain name of a folder beside it"));
    }
    Ok((pooling(&folder.join(path))?, normalised))
}

fn pooling(folder: &Path) -> Result<Pooling, SpecError> {
    const POOLING: &str = "config.json of Pooling";
    let config: Option<serde_json::Map<String, Value>> = parse(folder, "config.json")?;
    let config = config.ok_or_else(|| file(POOLING, "nothing", "a file that says how to pool"))?;
    let on = config.iter().filter(|(name, on)| name.starts_with("pooling_mode_") && **on == Value::Bool(true));
    // Newer files name the way itself.
    let modes: Vec<&str> = match config.get("pooling_mode").and_then(Value::as_str) {
        Some(mode) => vec![mode],
        None => on.map(|(name, _)| name.as_str()).collect(),
    };
    match modes[..] {
        ["pooling_mode_mean_tokens" | "mean"] => Ok(Pooling::Mean),
        ["pooling_mode_cls_token" | "cls"] => Ok(Pooling::First),
        _ => Err(file(POOLING, &modes.join(", "), "one of mean and cls")),
    }
}

fn file(file: &'static str, found: &str, supported: &'static str) -> SpecError {
    SpecError::Sentence { file, found: found.to_owned(), supported }
}

/// A file's bytes; none where there is no such file.
fn read(folder: &Path, file: &'static str) -> Result<Option<Vec<u8>>, SpecError> {
    match std::fs::read(folder.join(file)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SpecError::Read { file, source }),
    }
}

fn parse<T: for<'de> Deserialize<'de>>(folder: &Path, file: &'static str) -> Result<Option<T>, SpecError> {
    let Some(bytes) = read(folder, file)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|source| SpecError::SentenceJson { file, source })
}
