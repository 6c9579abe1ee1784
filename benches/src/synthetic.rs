//! A large model without a file: safetensors in memory, of pseudo-random numbers.
//!
//! Uniform bits with a bounded exponent instead of a normal distribution: a billion numbers in a second, and speed does not
//! depend on them.

/// A Llama of 1.1 billion parameters.
pub const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 8192, "tie_word_embeddings": false
}"#;

/// Weights for [`CONFIG`], as `f16`.
#[must_use]
pub fn llama() -> Vec<u8> {
    let tensors = tensors();
    let (mut entries, mut end) = (Vec::new(), 0);
    for (name, shape) in &tensors {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        entries.push(format!(r#""{name}":{{"dtype":"F16","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#));
    }
    let mut header = format!("{{{}}}", entries.join(","));
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut bytes = Vec::with_capacity(8 + header.len() + end);
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header.as_bytes());
    let mut state = 1u64;
    for (_, shape) in &tensors {
        let n = shape.iter().product::<usize>();
        for _ in 0..n / 4 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bytes.extend(if shape.len() == 1 { ONES } else { small(state ^ state >> 32) }.to_le_bytes());
        }
    }
    bytes
}

/// Four `f16` ones.
const ONES: u64 = 0x3c00_3c00_3c00_3c00;

/// Four `f16` of magnitude 1/512 to 1/32: any sign and fraction, exponents 6 to 9.
fn small(random: u64) -> u64 {
    const SIGN_AND_FRACTION: u64 = 0x83ff_83ff_83ff_83ff;
    const EXPONENT: u64 = 0x0c00_0c00_0c00_0c00;
    const LEAST: u64 = 0x1800_1800_1800_1800;
    (random & SIGN_AND_FRACTION) | ((random & EXPONENT) + LEAST)
}

/// Names and shapes.
fn tensors() -> Vec<(String, Vec<usize>)> {
    const HIDDEN: usize = 2_048;
    const LAYER: [(&str, &[usize]); 9] = [
        ("input_layernorm", &[HIDDEN]),
        ("self_attn.q_proj", &[HIDDEN, HIDDEN]),
        ("self_attn.k_proj", &[512, HIDDEN]),
        ("self_attn.v_proj", &[512, HIDDEN]),
        ("self_attn.o_proj", &[HIDDEN, HIDDEN]),
        ("post_attention_layernorm", &[HIDDEN]),
        ("mlp.gate_proj", &[8_192, HIDDEN]),
        ("mlp.up_proj", &[8_192, HIDDEN]),
        ("mlp.down_proj", &[HIDDEN, 8_192]),
    ];
    let table = vec![32_000, HIDDEN];
    let mut all = vec![("model.embed_tokens.weight".into(), table.clone()), ("lm_head.weight".into(), table)];
    all.push(("model.norm.weight".into(), vec![HIDDEN]));
    for layer in 0..16 {
        all.extend(LAYER.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape.to_vec())));
    }
    all
}
