//! Turns a golden checkpoint into a GGUF file as llama.cpp's converter does: names, order of rows, added ones, metadata.
//!
//! Done here, and not committed: ten families in eleven types would be two megabytes of files.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::bf16;
use safetensors::SafeTensors;
use serde_json::Value as Json;

use crate::gguf_file::{File, Tensor as Stored, Value};

/// Numbers of the types in a GGUF file.
pub(crate) const TYPES: [(GgmlDType, u32); 11] = [
    (GgmlDType::F32, 0),
    (GgmlDType::F16, 1),
    (GgmlDType::BF16, 30),
    (GgmlDType::Q4_0, 2),
    (GgmlDType::Q4_1, 3),
    (GgmlDType::Q5_0, 6),
    (GgmlDType::Q5_1, 7),
    (GgmlDType::Q8_0, 8),
    (GgmlDType::Q4K, 12),
    (GgmlDType::Q5K, 13),
    (GgmlDType::Q6K, 14),
];

/// Tensors by name: sizes from the outermost, values.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// What a golden folder holds, widened.
pub(crate) fn tensors(folder: &Path) -> Tensors {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let read = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let values = view.data().as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x).to_f32()).collect();
        (name, (view.shape().to_vec(), values))
    };
    SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(read).collect()
}

/// The same in a GGUF file: matrices as `dtype`, or as what `other` says for a name in it; the rest in 32 bits.
pub(crate) fn file(config: &Json, tensors: &Tensors, dtype: impl Fn(&str) -> GgmlDType) -> File {
    let arch = architecture(config);
    let mut file = File { metadata: metadata(arch, config), tensors: Vec::new() };
    if config["rope_parameters"]["rope_type"] == "llama3" {
        let divisors = divisors(config);
        let bytes = divisors.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (name, sizes) = ("rope_freqs.weight".to_owned(), vec![divisors.len() as u64]);
        file.tensors.push(Stored { name, sizes, kind: 0, bytes });
    }
    for (name, field) in [("rope_factors_long.weight", "long_factor"), ("rope_factors_short.weight", "short_factor")] {
        if let Some(factors) = config["rope_parameters"][field].as_array() {
            let bytes = factors.iter().flat_map(|x| (x.as_f64().unwrap() as f32).to_le_bytes()).collect();
            let sizes = vec![factors.len() as u64];
            file.tensors.push(Stored { name: name.to_owned(), sizes, kind: 0, bytes });
        }
    }
    for (name, (mut shape, values)) in joined(tensors) {
        let values = prepared(arch, config, &name, values);
        let name = renamed(arch, &name);
        let plain = shape.len() == 1 || name.contains("ffn_gate_inp");
        let dtype = if plain { GgmlDType::F32 } else { dtype(&name) };
        let bytes = quantised(&values, *shape.last().unwrap(), dtype);
        shape.reverse();
        let kind = TYPES.iter().find(|(known, _)| *known == dtype).unwrap().1;
        file.tensors.push(Stored { name, sizes: shape.iter().map(|&n| n as u64).collect(), kind, bytes });
    }
    file
}

/// Rows of width `k` in blocks.
pub(crate) fn quantised(values: &[f32], k: usize, dtype: GgmlDType) -> Vec<u8> {
    let tensor = Tensor::from_vec(values.to_vec(), (values.len() / k, k), &Device::Cpu).unwrap();
    QTensor::quantize(&tensor, dtype).unwrap().data().unwrap().into_owned()
}

/// What those blocks stand for.
pub(crate) fn rounded(values: &[f32], k: usize, dtype: GgmlDType) -> Vec<f32> {
    let tensor = Tensor::from_vec(values.to_vec(), (values.len() / k, k), &Device::Cpu).unwrap();
    let blocks = QTensor::quantize(&tensor, dtype).unwrap();
    blocks.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn architecture(config: &Json) -> &'static str {
    match config["architectures"][0].as_str().unwrap() {
        "LlamaForCausalLM" | "MistralForCausalLM" | "MixtralForCausalLM" => "llama",
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        "Qwen3MoeForCausalLM" => "qwen3moe",
        "Phi3ForCausalLM" => "phi3",
        "Gemma2ForCausalLM" => "gemma2",
        "Gemma3ForCausalLM" => "gemma3",
        other => panic!("{other}"),
    }
}

fn metadata(arch: &str, config: &Json) -> Vec<(String, Value)> {
    let mut all = vec![("general.architecture".to_owned(), Value::Text(arch.to_owned()))];
    for (key, field) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("rope.dimension_count", "head_dim"),
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
    ] {
        if let Some(found) = config[field].as_u64() {
            all.push((format!("{arch}.{key}"), Value::U32(found as u32)));
        }
    }
    let rope = &config["rope_parameters"];
    let global = if rope["full_attention"].is_object() { &rope["full_attention"] } else { rope };
    for (key, found) in [
        ("attention.layer_norm_rms_epsilon", &config["rms_norm_eps"]),
        ("rope.freq_base", &global["rope_theta"]),
        ("rope.freq_base_swa", &rope["sliding_attention"]["rope_theta"]),
        ("attn_logit_softcapping", &config["attn_logit_softcapping"]),
        ("final_logit_softcapping", &config["final_logit_softcapping"]),
    ] {
        if let Some(found) = found.as_f64() {
            all.push((format!("{arch}.{key}"), Value::F32(found as f32)));
        }
    }
    if ["phi3", "gemma2", "gemma3"].contains(&arch)
        && let Some(window) = config["sliding_window"].as_u64()
    {
        all.push((format!("{arch}.attention.sliding_window"), Value::U32(window as u32)));
    }
    let kind = rope["rope_type"].as_str().filter(|kind| ["yarn", "longrope"].contains(kind));
    if let Some(kind) = kind {
        let old_context = rope["original_max_position_embeddings"].as_u64().unwrap() as u32;
        let stretch = config["max_position_embeddings"].as_f64().unwrap() / f64::from(old_context);
        all.push((format!("{arch}.rope.scaling.type"), Value::Text(kind.to_owned())));
        all.push((format!("{arch}.rope.scaling.original_context_length"), Value::U32(old_context)));
        let more = match kind {
            "yarn" => ("factor", rope["factor"].as_f64().unwrap()),
            _ => ("attn_factor", (1.0 + stretch.ln() / f64::from(old_context).ln()).sqrt()),
        };
        all.push((format!("{arch}.rope.scaling.{}", more.0), Value::F32(more.1 as f32)));
    }
    all
}

/// What rotation frequencies of Llama 3 are divided by, in 32 bits as the converter has them.
fn divisors(config: &Json) -> Vec<f32> {
    let rope = |field: &str| config["rope_parameters"][field].as_f64().unwrap() as f32;
    let (factor, old) = (rope("factor"), rope("original_max_position_embeddings"));
    let (low, high) = (rope("low_freq_factor"), rope("high_freq_factor"));
    let width = config["head_dim"].as_u64().unwrap() as usize;
    let divisor = |i: usize| {
        let wave = std::f32::consts::TAU * rope("rope_theta").powf(2.0 * i as f32 / width as f32);
        match wave {
            _ if wave < old / high => 1.0,
            _ if wave > old / low => factor,
            _ => {
                let smooth = (old / wave - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        }
    };
    (0..width / 2).map(divisor).collect()
}

/// All experts of a layer in one tensor.
fn joined(tensors: &Tensors) -> Tensors {
    let mut joined = Tensors::new();
    for (name, (shape, values)) in tensors {
        let parts: Option<(&str, (&str, &str))> =
            name.split_once(".experts.").and_then(|(layer, rest)| Some((layer, rest.split_once('.')?)));
        let Some((layer, (_, part))) = parts else {
            joined.insert(name.clone(), (shape.clone(), values.clone()));
            continue;
        };
        // Names are ordered, and there are fewer than ten experts.
        let entry = joined.entry(format!("{layer}.experts.{part}"));
        let (all, data) = entry.or_insert_with(|| ([&[0], &shape[..]].concat(), Vec::new()));
        all[0] += 1;
        data.extend(values);
    }
    joined
}

/// Rows of q and k of a Llama alternate between the halves of a head; norms of a Gemma hold the one that is added.
fn prepared(arch: &str, config: &Json, name: &str, mut values: Vec<f32>) -> Vec<f32> {
    if arch.starts_with("gemma") && name.ends_with("norm.weight") {
        values.iter_mut().for_each(|x| *x += 1.0);
    }
    let turned = ["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"];
    if arch != "llama" || !turned.iter().any(|end| name.ends_with(end)) {
        return values;
    }
    let half = config["head_dim"].as_u64().unwrap() as usize / 2;
    let k = if name.ends_with("bias") { 1 } else { config["hidden_size"].as_u64().unwrap() as usize };
    let mut turned = Vec::new();
    for head in values.chunks(2 * half * k) {
        for i in 0..half {
            turned.extend(&head[i * k..][..k]);
            turned.extend(&head[(half + i) * k..][..k]);
        }
    }
    turned
}

fn renamed(arch: &str, name: &str) -> String {
    let after_attention = if arch.starts_with("gemma") { "post_attention_norm" } else { "ffn_norm" };
    let mut name = name.replace("model.layers", "blk").replace("block_sparse_moe", "mlp");
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", after_attention),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.experts.w1", "ffn_gate_exps"),
        ("mlp.experts.w3", "ffn_up_exps"),
        ("mlp.experts.w2", "ffn_down_exps"),
        ("mlp.experts.gate_proj", "ffn_gate_exps"),
        ("mlp.experts.up_proj", "ffn_up_exps"),
        ("mlp.experts.down_proj", "ffn_down_exps"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("mlp.gate", "ffn_gate_inp"),
    ] {
        name = name.replace(from, to);
    }
    name
}
