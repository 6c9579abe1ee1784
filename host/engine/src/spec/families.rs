//! The architectures: what each adds to the fields that all of them share.
//!
//! To add one of the same structure: a line in [`FAMILIES`] and a function that sets what differs, then a golden checkpoint
//! for it (`tests/engine/families.rs`).

use std::sync::LazyLock;

use serde_json::Value;

use super::read::{FieldError, Fields, invalid, missing, unsupported};
use super::rope;
use super::{Activation, Experts, ModelSpec, Naming, Rope, Window};

/// An architecture by the name that `config.json` gives it.
struct Family {
    architecture: &'static str,
    /// Sets what differs from a plain Llama.
    differ: fn(&Fields, &mut ModelSpec) -> Result<(), FieldError>,
}

const FAMILIES: &[Family] = &[
    Family { architecture: "LlamaForCausalLM", differ: llama },
    Family { architecture: "MistralForCausalLM", differ: mistral },
    Family { architecture: "MixtralForCausalLM", differ: mixtral },
    Family { architecture: "Qwen2ForCausalLM", differ: qwen2 },
    Family { architecture: "Qwen3ForCausalLM", differ: qwen3 },
    Family { architecture: "Qwen3MoeForCausalLM", differ: qwen3_moe },
    Family { architecture: "Phi3ForCausalLM", differ: phi3 },
    Family { architecture: "Gemma2ForCausalLM", differ: gemma2 },
    Family { architecture: "Gemma3ForCausalLM", differ: gemma3 },
];

/// So that what is looked up for each pair of layers stays cheap whatever a file claims.
const MAX_LAYERS: usize = 4096;

/// Their names, for whoever brings another.
static ARCHITECTURES: LazyLock<String> =
    LazyLock::new(|| FAMILIES.iter().map(|family| family.architecture).collect::<Vec<_>>().join(", "));

pub(super) fn from_fields(fields: &Fields) -> Result<ModelSpec, FieldError> {
    let family = family(fields)?;
    fields.only("quantization_config", "null: F32, F16 or BF16 weights", |_| false)?;
    let mut spec = shared(fields)?;
    (family.differ)(fields, &mut spec)?;
    spec.checked()
}

fn family(fields: &Fields) -> Result<&'static Family, FieldError> {
    let missing = missing("architectures", "a list of one name");
    let found = fields.get("architectures").ok_or(missing)?;
    let known = match found {
        Value::Array(names) if names.len() == 1 => FAMILIES.iter().find(|family| names[0] == family.architecture),
        _ => None,
    };
    known.ok_or_else(|| unsupported("architectures", found.to_string(), &ARCHITECTURES))
}

/// What all families say in the same fields.
fn shared(fields: &Fields) -> Result<ModelSpec, FieldError> {
    let (hidden, heads) = (fields.size("hidden_size")?, fields.size("num_attention_heads")?);
    let layers = fields.size("num_hidden_layers")?;
    if layers > MAX_LAYERS {
        return Err(invalid("num_hidden_layers", layers, "at most 4096"));
    }
    let head_dim = fields.size_or("head_dim", hidden / heads)?;
    let activation = fields.get("hidden_activation").or_else(|| fields.get("hidden_act"));
    let activation = match activation.map(|name| (name, name.as_str())) {
        None | Some((_, Some("silu"))) => Activation::Silu,
        Some((_, Some("gelu_pytorch_tanh"))) => Activation::GeluTanh,
        Some((found, _)) => return Err(unsupported("hidden_act", found.to_string(), "silu, gelu_pytorch_tanh")),
    };
    let parameters = fields.get("rope_parameters").or_else(|| fields.get("rope_scaling"));
    let rope = match parameters {
        // Several, by kind of layer: the family picks.
        Some(parameters) if parameters.get("full_attention").is_some() => Rope::plain(head_dim),
        parameters => Rope::read(fields, parameters, head_dim)?,
    };
    Ok(ModelSpec {
        vocab: fields.size("vocab_size")?,
        hidden,
        layers,
        heads,
        kv_heads: fields.size_or("num_key_value_heads", heads)?,
        head_dim,
        ffn: fields.size("intermediate_size")?,
        context: rope::context(fields, parameters, &rope)?,
        norm_eps: fields.positive_or_none("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        norm_plus_one: false,
        post_norms: false,
        embedding_scale: 1.0,
        tied: fields.flag_or("tie_word_embeddings", false)?,
        rope,
        window_rope: None,
        window: None,
        qkv_bias: false,
        out_bias: false,
        qk_norm: false,
        score_scale: 1.0 / (head_dim as f32).sqrt(),
        score_cap: None,
        logit_cap: None,
        activation,
        experts: None,
        naming: Naming::Split,
    })
}

/// A window in the layers that `layer_types` names, or else in those for which `default` holds.
fn window(fields: &Fields, spec: &mut ModelSpec, default: impl Fn(usize) -> bool) -> Result<(), FieldError> {
    let kinds = fields.names("layer_types", spec.layers)?;
    let layers: Vec<bool> = match &kinds {
        None => (0..spec.layers).map(default).collect(),
        Some(kinds) => kinds.iter().map(|&kind| kind == "sliding_attention").collect(),
    };
    let other = |kind: &&&str| !["sliding_attention", "full_attention"].contains(*kind);
    if let Some(kind) = kinds.iter().flatten().find(other) {
        return Err(unsupported("layer_types", (*kind).to_owned(), "full_attention, sliding_attention"));
    }
    if layers.contains(&true) {
        let positions = fields.size_or_none("sliding_window")?;
        spec.window = positions.map(|positions| Window { positions, layers });
    }
    Ok(())
}

// === the families ===

fn llama(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    fields.only("mlp_bias", "false", |value| value == false)?;
    fields.only("sliding_window", "null", |_| false)?;
    let bias = fields.flag_or("attention_bias", false)?;
    (spec.qkv_bias, spec.out_bias) = (bias, bias);
    Ok(())
}

fn mistral(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    window(fields, spec, |_| true)
}

fn mixtral(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    mistral(fields, spec)?;
    spec.naming = Naming::Mixtral;
    spec.experts = Some(Experts {
        count: fields.size("num_local_experts")?,
        per_token: fields.size("num_experts_per_tok")?,
        normalised: true,
        dense: vec![None; spec.layers],
    });
    Ok(())
}

fn qwen2(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    qwen_window(fields, spec)?;
    spec.qkv_bias = true;
    Ok(())
}

fn qwen3(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    qwen_window(fields, spec)?;
    let bias = fields.flag_or("attention_bias", false)?;
    (spec.qkv_bias, spec.out_bias, spec.qk_norm) = (bias, bias, true);
    Ok(())
}

/// Windows are off unless asked for, and then in the upper layers.
fn qwen_window(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    if !fields.flag_or("use_sliding_window", false)? {
        return Ok(());
    }
    let first = fields.count_or("max_window_layers", spec.layers)?;
    window(fields, spec, |layer| layer >= first)
}

fn qwen3_moe(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    qwen3(fields, spec)?;
    let only_dense = match fields.get("mlp_only_layers") {
        None => Vec::new(),
        Some(list) => match list.as_array() {
            Some(list) => list.iter().filter_map(Value::as_u64).collect(),
            None => return Err(unsupported("mlp_only_layers", list.to_string(), "a list of layers")),
        },
    };
    let step = fields.size_or("decoder_sparse_step", 1)?;
    let wide = spec.ffn;
    let is_dense = |layer: usize| only_dense.contains(&(layer as u64)) || !(layer + 1).is_multiple_of(step);
    spec.ffn = fields.size("moe_intermediate_size")?;
    spec.experts = Some(Experts {
        count: match fields.size_or_none("num_local_experts")? {
            Some(count) => count,
            None => fields.size("num_experts")?,
        },
        per_token: fields.size("num_experts_per_tok")?,
        normalised: fields.flag_or("norm_topk_prob", false)?,
        dense: (0..spec.layers).map(|layer| is_dense(layer).then_some(wide)).collect(),
    });
    Ok(())
}

fn phi3(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    spec.naming = Naming::Packed;
    window(fields, spec, |_| true)
}

fn gemma2(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    gemma(fields, spec)?;
    window(fields, spec, |layer| layer % 2 == 0)
}

fn gemma3(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    gemma(fields, spec)?;
    spec.qk_norm = true;
    let every = fields.size_or("sliding_window_pattern", 6)?;
    window(fields, spec, |layer| (layer + 1) % every != 0)?;
    if let Some(parameters) = fields.get("rope_parameters").filter(|all| all.get("full_attention").is_some()) {
        spec.rope = Rope::read(fields, parameters.get("full_attention"), spec.head_dim)?;
        spec.window_rope = Some(Rope::read(fields, parameters.get("sliding_attention"), spec.head_dim)?);
        return Ok(());
    }
    if fields.get("rope_theta").is_none() && fields.get("rope_parameters").is_none() {
        spec.rope.theta = 1_000_000.0;
    }
    let theta = fields.positive_or_none("rope_local_base_freq")?.unwrap_or(10_000.0);
    spec.window_rope = Some(Rope { theta, ..Rope::plain(spec.head_dim) });
    Ok(())
}

fn gemma(fields: &Fields, spec: &mut ModelSpec) -> Result<(), FieldError> {
    fields.only("attention_bias", "false", |value| value == false)?;
    fields.only("use_bidirectional_attention", "false", |value| value == false)?;
    if fields.get("hidden_activation").is_none() {
        spec.activation = Activation::GeluTanh;
    }
    (spec.norm_plus_one, spec.post_norms) = (true, true);
    spec.tied = fields.flag_or("tie_word_embeddings", true)?;
    spec.embedding_scale = (spec.hidden as f32).sqrt();
    let per_query = fields.positive_or_none("query_pre_attn_scalar")?.unwrap_or(256.0);
    spec.score_scale = per_query.powf(-0.5) as f32;
    spec.score_cap = fields.positive_or_none("attn_logit_softcapping")?.map(|cap| cap as f32);
    spec.logit_cap = fields.positive_or_none("final_logit_softcapping")?.map(|cap| cap as f32);
    Ok(())
}
