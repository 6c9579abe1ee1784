//! What distinguishes one decoder transformer from another, as data, read from a Hugging Face `config.json`.
//!
//! The reader accepts what the forward pass computes and refuses the rest by name: a field that would silently change the
//! mathematics (a bias, a scaled rope, another activation) is an error here, never a wrong token later.

use serde_json::{Map, Value};

/// A decoder transformer of the Llama family: RMSNorm before each half, rotate-half RoPE, grouped-query attention, SwiGLU.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward half.
    pub ffn: usize,
    /// Positions that the model was trained for.
    pub context: usize,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f32,
    /// Base of the rotation frequencies.
    pub rope_theta: f64,
    /// Whether the output head is the embedding.
    pub tied: bool,
}

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
}

/// Upper bound of every size, so that products of sizes cannot overflow.
const MAX_SIZE: u64 = 1 << 24;

/// A field that must be one of a few values when it is there.
struct Only {
    field: &'static str,
    accept: fn(&Value) -> bool,
    supported: &'static str,
}

const ONLY: &[Only] = &[
    Only { field: "hidden_act", accept: |v| v == "silu", supported: "silu" },
    Only { field: "attention_bias", accept: |v| v == false, supported: "false" },
    Only { field: "mlp_bias", accept: |v| v == false, supported: "false" },
    Only { field: "quantization_config", accept: Value::is_null, supported: "null: F32, F16 or BF16 weights" },
    Only { field: "rope_scaling", accept: is_plain_rope, supported: "null, or rope_type = default" },
    Only { field: "rope_parameters", accept: is_plain_rope, supported: "null, or rope_type = default" },
    Only { field: "partial_rotary_factor", accept: |v| v.as_f64() == Some(1.0) || v.is_null(), supported: "1" },
    Only { field: "sliding_window", accept: Value::is_null, supported: "null" },
];

fn is_plain_rope(value: &Value) -> bool {
    let kind = value.get("rope_type").or_else(|| value.get("type"));
    value.is_null() || kind.is_some_and(|kind| kind == "default")
}

impl ModelSpec {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// The first field that is missing, impossible or not supported.
    pub fn from_config(json: &[u8]) -> Result<Self, SpecError> {
        let fields: Map<String, Value> = serde_json::from_slice(json)?;
        check_architecture(&fields)?;
        for only in ONLY {
            match fields.get(only.field) {
                Some(found) if !(only.accept)(found) => {
                    return Err(unsupported(only.field, found.to_string(), only.supported));
                }
                _ => {}
            }
        }
        let (hidden, heads) = (size(&fields, "hidden_size", None)?, size(&fields, "num_attention_heads", None)?);
        let theta_at = fields.get("rope_parameters").and_then(Value::as_object).unwrap_or(&fields);
        Self {
            vocab: size(&fields, "vocab_size", None)?,
            hidden,
            layers: size(&fields, "num_hidden_layers", None)?,
            heads,
            kv_heads: size(&fields, "num_key_value_heads", Some(heads))?,
            head_dim: size(&fields, "head_dim", Some(hidden / heads))?,
            ffn: size(&fields, "intermediate_size", None)?,
            context: size(&fields, "max_position_embeddings", None)?,
            norm_eps: positive(&fields, "rms_norm_eps", 1e-6)? as f32,
            rope_theta: positive(theta_at, "rope_theta", 10_000.0)?,
            tied: flag(&fields, "tie_word_embeddings", false)?,
        }
        .checked()
    }

    /// Checks that the kernels can serve these sizes.
    ///
    /// # Errors
    /// The first size that does not fit.
    pub fn checked(self) -> Result<Self, SpecError> {
        let q_dim = self.heads.saturating_mul(self.head_dim);
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            let expected = "a divisor of num_attention_heads";
            return Err(SpecError::Invalid {
                field: "num_key_value_heads",
                found: self.kv_heads.to_string(),
                expected,
            });
        }
        let multiples = [
            ("hidden_size", self.hidden),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.ffn),
            ("num_attention_heads * head_dim", q_dim),
        ];
        match multiples.into_iter().find(|&(_, found)| found == 0 || found % 32 != 0) {
            Some((field, found)) => Err(unsupported(field, found.to_string(), "multiples of 32")),
            None => Ok(self),
        }
    }

    /// Width of the query heads together.
    #[must_use]
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the key heads together, and of the value heads.
    #[must_use]
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

fn unsupported(field: &'static str, found: String, supported: &'static str) -> SpecError {
    SpecError::Unsupported { field, found, supported }
}

fn check_architecture(fields: &Map<String, Value>) -> Result<(), SpecError> {
    const EXPECTED: &str = "[\"LlamaForCausalLM\"]";
    match fields.get("architectures") {
        None => Err(SpecError::Missing { field: "architectures", expected: EXPECTED }),
        Some(Value::Array(names)) if names.len() == 1 && names[0] == "LlamaForCausalLM" => Ok(()),
        Some(found) => Err(unsupported("architectures", found.to_string(), EXPECTED)),
    }
}

fn size(fields: &Map<String, Value>, field: &'static str, default: Option<usize>) -> Result<usize, SpecError> {
    const EXPECTED: &str = "a whole number from 1 to 2^24";
    match (fields.get(field), default) {
        (None | Some(Value::Null), Some(default)) => Ok(default),
        (None | Some(Value::Null), None) => Err(SpecError::Missing { field, expected: EXPECTED }),
        (Some(found), _) => match found.as_u64() {
            Some(size @ 1..=MAX_SIZE) => Ok(size as usize),
            _ => Err(SpecError::Invalid { field, found: found.to_string(), expected: EXPECTED }),
        },
    }
}

fn positive(fields: &Map<String, Value>, field: &'static str, default: f64) -> Result<f64, SpecError> {
    match fields.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(found) => found.as_f64().filter(|x| *x > 0.0).ok_or_else(|| SpecError::Invalid {
            field,
            found: found.to_string(),
            expected: "a positive number",
        }),
    }
}

fn flag(fields: &Map<String, Value>, field: &'static str, default: bool) -> Result<bool, SpecError> {
    match fields.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(found) => Err(SpecError::Invalid { field, found: found.to_string(), expected: "true or false" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Map<String, Value> {
        let text = r#"{"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 128,
            "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "vocab_size": 2048, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
            "rope_theta": 50000.0, "rope_scaling": null, "attention_bias": false, "tie_word_embeddings": true}"#;
        serde_json::from_str(text).unwrap()
    }

    fn read(fields: &Map<String, Value>) -> Result<ModelSpec, SpecError> {
        ModelSpec::from_config(&serde_json::to_vec(fields).unwrap())
    }

    #[test]
    fn a_llama_config_is_read() {
        let spec = read(&config()).unwrap();
        let expect = ModelSpec {
            vocab: 2048,
            hidden: 128,
            layers: 3,
            heads: 4,
            kv_heads: 2,
            head_dim: 32,
            ffn: 352,
            context: 1024,
            norm_eps: 1e-5,
            rope_theta: 50_000.0,
            tied: true,
        };
        assert_eq!(spec, expect);
        assert_eq!((spec.q_dim(), spec.kv_dim()), (128, 64));
    }

    #[test]
    fn optional_fields_have_the_defaults_of_the_family() {
        let mut fields = config();
        for field in
            ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act"]
        {
            fields.remove(field);
        }
        fields.insert("rope_parameters".into(), serde_json::json!({"rope_type": "default", "rope_theta": 7.5}));
        let spec = read(&fields).unwrap();
        assert_eq!((spec.kv_heads, spec.head_dim, spec.rope_theta, spec.tied), (4, 32, 7.5, false));
        assert_eq!(spec.norm_eps, 1e-6);
    }

    #[test]
    fn odd_fields_are_named_with_what_is_supported() {
        let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        for (field, value, expect) in [
            (
                "architectures",
                r#"["GemmaForCausalLM"]"#,
                r#"architectures = ["GemmaForCausalLM"], which is not supported; supported: ["LlamaForCausalLM"]"#,
            ),
            (
                "rope_scaling",
                r#"{"rope_type":"yarn"}"#,
                r#"rope_scaling = {"rope_type":"yarn"}, which is not supported; supported: null"#,
            ),
            ("hidden_act", r#""gelu""#, r#"hidden_act = "gelu", which is not supported; supported: silu"#),
            ("attention_bias", "true", "attention_bias = true, which is not supported; supported: false"),
            ("quantization_config", "{}", "quantization_config = {}, which is not supported"),
            ("vocab_size", "-1", "vocab_size = -1; it must be a whole number"),
            ("vocab_size", "null", "lacks vocab_size; it must be a whole number"),
            ("rms_norm_eps", "0", "rms_norm_eps = 0; it must be a positive number"),
            ("tie_word_embeddings", "1", "tie_word_embeddings = 1; it must be true or false"),
            ("head_dim", "40", "head_dim = 40, which is not supported; supported: multiples of 32"),
            ("num_key_value_heads", "3", "num_key_value_heads = 3; it must be a divisor of num_attention_heads"),
        ] {
            let mut fields = config();
            fields.insert(field.into(), json(value));
            let error = read(&fields).unwrap_err().to_string();
            assert!(error.contains(expect), "{field}: {error}");
        }
        assert!(ModelSpec::from_config(b"{").unwrap_err().to_string().contains("not JSON"));
        let mut fields = config();
        fields.remove("architectures");
        assert!(read(&fields).unwrap_err().to_string().contains("lacks architectures"));
    }
}
