//! A GGUF file's metadata as the fields of a `config.json`, so that both formats go through the same families.
//!
//! What the format leaves to the reader stands here: which family a `llama` is, the constants of the Gemmas, biases and tied heads
//! told by the tensors that are there. An error names the key that the file would have.

use serde_json::{Map, Number, Value as Json};

use super::families;
use super::read::{FieldError, Fields, SpecError, invalid, missing, positive, unsupported};
use super::{ModelSpec, Naming, RopeScaling};
use crate::load::Weights;
use crate::load::gguf::Value;

/// Architectures by the name that the metadata has.
const ARCHITECTURES: [(&str, &str); 7] = [
    ("llama", "LlamaForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
    ("qwen3moe", "Qwen3MoeForCausalLM"),
    ("phi3", "Phi3ForCausalLM"),
    ("gemma2", "Gemma2ForCausalLM"),
    ("gemma3", "Gemma3ForCausalLM"),
];

/// Keys behind the name of the architecture, by the fields that they stand for.
const KEYS: [(&str, &str); 18] = [
    ("hidden_size", "embedding_length"),
    ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("intermediate_size", "feed_forward_length"),
    ("max_position_embeddings", "context_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("rope_theta", "rope.freq_base"),
    ("rope_local_base_freq", "rope.freq_base_swa"),
    ("sliding_window", "attention.sliding_window"),
    ("sliding_window_pattern", "attention.sliding_window_pattern"),
    ("num_local_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("rope_scaling", "rope.scaling.type"),
];

/// Keys that would change what is computed, and the one value for which they do not.
const PLAIN: [(&str, &str, Accepts); 7] = [
    ("attention.causal", "true", |value| *value == Value::Flag(true)),
    ("attention.scale", "none", |_| false),
    ("expert_shared_count", "0", |value| *value == Value::Whole(0)),
    ("expert_group_count", "0 or 1", |value| matches!(value, Value::Whole(0 | 1))),
    ("expert_gating_func", "1 (softmax)", |value| *value == Value::Whole(1)),
    ("nextn_predict_layers", "0", |value| *value == Value::Whole(0)),
    ("logit_scale", "none", |_| false),
];

type Accepts = fn(&Value<'_>) -> bool;

/// Elements of a list that are looked at.
const MAX_LIST: usize = 1 << 12;

struct Keys<'a> {
    weights: &'a Weights,
    arch: String,
}

pub(super) fn from_gguf(weights: &Weights) -> Result<ModelSpec, SpecError> {
    let arch = match weights.metadata("general.architecture") {
        Some(Value::Text(name)) => name.into_owned(),
        _ => return Err(SpecError::Metadata(missing("general.architecture", "the name of an architecture"))),
    };
    let keys = Keys { weights, arch };
    let mut spec = keys.read().map_err(SpecError::Metadata)?;
    let (bias, out_bias) = ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.o_proj.bias");
    let packed_bias = "model.layers.0.self_attn.qkv_proj.bias";
    spec.naming = Naming::Gguf { interleaved: keys.arch == "llama" };
    spec.norm_plus_one = false;
    spec.qkv_bias = weights.has(bias) || weights.has(packed_bias);
    spec.out_bias = weights.has(out_bias);
    if let Some(Value::Whole(width)) = keys.get("rope.dimension_count") {
        let fits = usize::try_from(width).ok().filter(|width| (2..=spec.head_dim).contains(width) && width % 32 == 0);
        let field = keys.key("rope.dimension_count").into();
        let (found, supported) = (width.to_string(), "multiples of 32 up to the width of a head");
        let wrong = FieldError::Unsupported { field, found, supported };
        spec.rope.width = fits.ok_or(SpecError::Metadata(wrong))?;
    }
    keys.divided(&mut spec)?;
    Ok(spec)
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn get(&self, name: &str) -> Option<Value<'_>> {
        self.weights.metadata(&self.key(name))
    }

    fn read(&self) -> Result<ModelSpec, FieldError> {
        for (name, supported, accepts) in PLAIN {
            if let Some(found) = self.get(name).filter(|found| !accepts(found)) {
                let field = self.key(name).into();
                return Err(FieldError::Unsupported { field, found: json(&found).to_string(), supported });
            }
        }
        let fields = Fields(self.fields()?);
        let called = |field: &str| match field {
            "vocab_size" => Some("token_embd.weight".to_owned()),
            field => KEYS.iter().find(|(name, _)| *name == field).map(|(_, key)| self.key(key)),
        };
        families::from_fields(&fields).map_err(|error| error.renamed(called))
    }

    fn fields(&self) -> Result<Map<String, Json>, FieldError> {
        let mut fields = Map::new();
        for (field, key) in KEYS {
            if let Some(value) = self.get(key) {
                fields.insert(field.to_owned(), json(&value));
            }
        }
        // 0 says that there is none.
        for field in ["sliding_window", "num_local_experts", "attn_logit_softcapping", "final_logit_softcapping"] {
            if fields.get(field).and_then(Json::as_f64) == Some(0.0) {
                fields.remove(field);
            }
        }
        let mut architecture = ARCHITECTURES.iter().find(|(name, _)| *name == self.arch).map(|(_, name)| *name);
        if self.arch == "llama" && fields.contains_key("num_local_experts") {
            architecture = Some("MixtralForCausalLM");
        } else if self.arch == "llama" && fields.contains_key("sliding_window") {
            architecture = Some("MistralForCausalLM");
        }
        const SUPPORTED: &str = "llama, qwen2, qwen3, qwen3moe, phi3, gemma2, gemma3";
        let unknown = || unsupported("general.architecture", &self.arch, SUPPORTED);
        fields.insert("architectures".to_owned(), vec![architecture.ok_or_else(unknown)?].into());
        let embedding = self.weights.shape("model.embed_tokens.weight").unwrap_or_default();
        fields.insert("vocab_size".to_owned(), embedding.first().copied().into());
        fields.insert("tie_word_embeddings".to_owned(), (!self.weights.has("lm_head.weight")).into());
        fields.insert("mlp_bias".to_owned(), self.weights.has("model.layers.0.mlp.up_proj.bias").into());
        self.stretched(&mut fields)?;
        self.constants(&mut fields);
        Ok(fields)
    }

    /// Frequencies that tensors divide, each by a number of its own: those of Llama 3, and of LongRoPE those of the context.
    fn divided(&self, spec: &mut ModelSpec) -> Result<(), SpecError> {
        let mut name = "rope_freqs.weight";
        if self.weights.has("rope_factors_long.weight") {
            let old_context = self.number("rope.scaling.original_context_length").map_err(SpecError::Metadata)?;
            let is_long = old_context.is_none_or(|old_context| spec.context as f64 > old_context);
            name = if is_long { "rope_factors_long.weight" } else { "rope_factors_short.weight" };
            spec.rope.magnitude = self.number("rope.scaling.attn_factor").map_err(SpecError::Metadata)?.unwrap_or(1.0);
        } else if !self.weights.has(name) {
            return Ok(());
        }
        let divisors = self.weights.get(name, &[spec.rope.width / 2])?.to_f32();
        if let Some(found) = divisors.iter().find(|divisor| **divisor <= 0.0) {
            return Err(SpecError::Metadata(invalid(name, found, "numbers above 0")));
        }
        spec.rope.scaling = RopeScaling::Divided(divisors);
        Ok(())
    }

    /// A positive number, where the file has it.
    fn number(&self, name: &'static str) -> Result<Option<f64>, FieldError> {
        self.get(name).map(|found| positive(name, &json(&found))).transpose()
    }

    /// `rope_scaling` from its keys. A factor without a type is linear.
    fn stretched(&self, fields: &mut Map<String, Json>) -> Result<(), FieldError> {
        if let Some(width) = self.get("attention.value_length")
            && fields.get("head_dim").is_some_and(|head_dim| *head_dim != json(&width))
        {
            let (field, found) = (self.key("attention.value_length").into(), json(&width).to_string());
            return Err(FieldError::Unsupported { field, found, supported: "that of the keys" });
        }
        let factor = self.get("rope.scaling.factor").map(|factor| json(&factor)).unwrap_or_default();
        let default = if factor.is_null() { "none" } else { "linear" };
        let kind = fields.remove("rope_scaling").unwrap_or_else(|| default.into());
        let mut scaling = serde_json::json!({"rope_type": kind, "factor": factor});
        if kind == "yarn" {
            scaling["original_max_position_embeddings"] =
                self.get("rope.scaling.original_context_length").map(|found| json(&found)).into();
            // What llama.cpp multiplies by, beside what YaRN does of itself.
            if let (Some(more), Some(factor)) = (self.number("rope.scaling.attn_factor")?, factor.as_f64()) {
                scaling["attention_factor"] = (more * (1.0 + 0.1 * factor.ln())).into();
            }
        }
        // The factors of LongRoPE are tensors.
        if kind != "none" && kind != "longrope" {
            fields.insert("rope_scaling".to_owned(), scaling);
        }
        Ok(())
    }

    /// What llama.cpp has in its code instead of the file.
    fn constants(&self, fields: &mut Map<String, Json>) {
        let size = |field: &str| fields.get(field).and_then(Json::as_u64).unwrap_or(0);
        let (layers, hidden, heads, head_dim) =
            (size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads"), size("head_dim"));
        match &*self.arch {
            "gemma2" | "gemma3" => {
                // The models of 27 billion scale scores by the width of the residual stream.
                let per_query = match (&*self.arch, layers) {
                    ("gemma2", 46) | ("gemma3", 62) if heads > 0 => hidden / heads,
                    _ => head_dim,
                };
                fields.insert("query_pre_attn_scalar".to_owned(), per_query.into());
            }
            "qwen3moe" => {
                let dense = |layer: &u64| !self.weights.has(&format!("model.layers.{layer}.mlp.gate.weight"));
                let dense: Vec<u64> = (0..layers.min(1 << 16)).filter(dense).collect();
                fields.insert("mlp_only_layers".to_owned(), dense.into());
                fields.insert("norm_topk_prob".to_owned(), true.into());
            }
            _ => {}
        }
    }
}

/// A value as JSON; a list of equal numbers is one of them.
fn json(value: &Value<'_>) -> Json {
    match value {
        Value::Whole(n) => i64::try_from(*n).map_or_else(|_| u64::try_from(*n).unwrap_or(u64::MAX).into(), Json::from),
        Value::Real(x) => Number::from_f64(*x).map_or_else(|| x.to_string().into(), Json::Number),
        Value::Flag(flag) => (*flag).into(),
        Value::Text(text) => text.as_ref().into(),
        Value::List(list) => {
            let mut all: Vec<Json> = list.iter().take(MAX_LIST).map(|value| json(&value)).collect();
            match all.windows(2).all(|pair| pair[0] == pair[1]) && all.first().is_some_and(Json::is_number) {
                true => all.swap_remove(0),
                false => Json::Array(all),
            }
        }
    }
}
