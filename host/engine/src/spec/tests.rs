//! Reading configurations: what is accepted, and what a wrong field is told.

use serde_json::{Map, Value};

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
        norm_plus_one: false,
        post_norms: false,
        embedding_scale: 1.0,
        tied: true,
        rope: Rope { theta: 50_000.0, width: 32, scaling: RopeScaling::None, magnitude: 1.0 },
        window_rope: None,
        window: None,
        qkv_bias: false,
        out_bias: false,
        qk_norm: false,
        score_scale: 1.0 / 32f32.sqrt(),
        score_cap: None,
        logit_cap: None,
        activation: Activation::Silu,
        experts: None,
        naming: Naming::Split,
    };
    assert_eq!(spec, expect);
    assert_eq!((spec.q_dim(), spec.kv_dim()), (128, 64));
}

#[test]
fn optional_fields_have_the_defaults_of_the_family() {
    let mut fields = config();
    for field in ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act"]
    {
        fields.remove(field);
    }
    fields.insert("rope_parameters".into(), serde_json::json!({"rope_type": "default", "rope_theta": 7.5}));
    let spec = read(&fields).unwrap();
    assert_eq!((spec.kv_heads, spec.head_dim, spec.rope.theta, spec.tied), (4, 32, 7.5, false));
    assert_eq!(spec.norm_eps, 1e-6);
}

#[test]
fn odd_fields_are_named_with_what_is_supported() {
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    for (field, value, expect) in [
        (
            "architectures",
            r#"["GemmaForCausalLM"]"#,
            r#"architectures = ["GemmaForCausalLM"], which is not supported; supported: LlamaForCausalLM, Mi"#,
        ),
        (
            "rope_scaling",
            r#"{"rope_type":"dynamic"}"#,
            r#"rope_scaling = {"rope_type":"dynamic"}, which is not supported; supported: null"#,
        ),
        ("hidden_act", r#""gelu""#, r#"hidden_act = "gelu", which is not supported; supported: silu"#),
        ("mlp_bias", "true", "mlp_bias = true, which is not supported; supported: false"),
        ("sliding_window", "64", "sliding_window = 64, which is not supported; supported: null"),
        ("rope_scaling", r#"{"type":"linear"}"#, "lacks factor; it must be a positive number in rope_scaling"),
        ("partial_rotary_factor", "2", "partial_rotary_factor = 2; it must be a number above 0 and up to 1"),
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

#[test]
fn families_differ_where_they_do() {
    let read = |architecture: &str, more: serde_json::Value| {
        let mut fields = config();
        fields.insert("architectures".into(), serde_json::json!([architecture]));
        fields.extend(more.as_object().unwrap().clone());
        read(&fields)
    };
    let qwen2 = |more| read("Qwen2ForCausalLM", more).unwrap();
    assert!(qwen2(serde_json::json!({})).qkv_bias);
    // A window that is named and not used.
    assert_eq!(qwen2(serde_json::json!({"sliding_window": 16})).window, None);
    let used = serde_json::json!({"sliding_window": 16, "use_sliding_window": true, "max_window_layers": 1});
    let layers = vec![false, true, true];
    assert_eq!(qwen2(used).window, Some(Window { positions: 16, layers: layers.clone() }));
    let kinds = ["full_attention", "sliding_attention", "sliding_attention"];
    let mistral = serde_json::json!({"sliding_window": 16, "layer_types": kinds});
    assert_eq!(read("MistralForCausalLM", mistral).unwrap().window, Some(Window { positions: 16, layers }));
    let gemma = read("Gemma3ForCausalLM", serde_json::json!({"sliding_window": 16, "rope_theta": null})).unwrap();
    assert_eq!((gemma.rope.theta, gemma.window_rope.as_ref().unwrap().theta), (1_000_000.0, 10_000.0));
    assert!(gemma.has_window_rope(0) && gemma.qk_norm && gemma.post_norms);

    for (architecture, more, expect) in [
        ("MixtralForCausalLM", serde_json::json!({"num_experts_per_tok": 2}), "lacks num_local_experts"),
        (
            "MixtralForCausalLM",
            serde_json::json!({"num_experts_per_tok": 3, "num_local_experts": 2}),
            "num_experts_per_tok = 3; it must be at most the number of experts",
        ),
        ("MistralForCausalLM", serde_json::json!({"layer_types": ["full_attention"]}), "one name per layer"),
        (
            "MistralForCausalLM",
            serde_json::json!({"layer_types": ["full_attention", "mamba", "full_attention"]}),
            "layer_types = mamba, which is not supported; supported: full_attention, sliding_attention",
        ),
        ("Qwen3MoeForCausalLM", serde_json::json!({"num_experts": 4}), "lacks moe_intermediate_size"),
    ] {
        let error = read(architecture, more).unwrap_err().to_string();
        assert!(error.contains(expect), "{architecture}: {error}");
    }
}

#[test]
fn smollm_is_a_llama() {
    let config = r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": true,
        "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_interleaved": false,
        "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true, "vocab_size": 49152}"#;
    let spec = ModelSpec::from_config(config.as_bytes()).unwrap();
    assert_eq!((spec.head_dim, spec.q_dim(), spec.kv_dim(), spec.rope.theta), (64, 576, 192, 100_000.0));
}

#[test]
fn llama3_stretches_low_frequencies_only() {
    let scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, old_context: 8192.0 };
    let stretched = Rope { theta: 500_000.0, width: 128, scaling, magnitude: 1.0 }.frequencies();
    let plain = Rope { theta: 500_000.0, width: 128, scaling: RopeScaling::None, magnitude: 1.0 }.frequencies();
    for (i, (stretched, plain)) in stretched.iter().zip(&plain).enumerate() {
        let turns = 8192.0 * plain / std::f64::consts::TAU;
        let share = stretched / plain;
        match turns {
            _ if turns > 4.0 => assert_eq!(share, 1.0, "{i}"),
            _ if turns < 1.0 => assert_eq!(share, 1.0 / 8.0, "{i}"),
            _ => assert!(share > 1.0 / 8.0 && share < 1.0, "{i}: {share}"),
        }
    }
}

#[test]
fn yarn_and_longrope_are_read_in_the_ways_that_files_have() {
    let read = |more: Value| {
        let mut fields = config();
        fields.insert("max_position_embeddings".into(), more["context"].clone());
        fields.insert("original_max_position_embeddings".into(), more["beside"].clone());
        fields.insert("rope_scaling".into(), more["scaling"].clone());
        read(&fields)
    };
    let factors = |x: f32| vec![x; 16];
    let longrope =
        |kind: &str| serde_json::json!({"type": kind, "short_factor": factors(2.0), "long_factor": factors(3.0)});
    let natural = 0.1 * 4f64.ln() + 1.0;
    // The context that is served, the first divisor and the last, and the magnitude.
    for (found, context, divisors, magnitude) in [
        // The context of the file is the old one or the stretched one.
        (
            r#"{"context": 1024, "scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}"#,
            4096,
            [1.0, 4.0],
            natural,
        ),
        (
            r#"{"context": 4096, "scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}"#,
            4096,
            [1.0, 4.0],
            natural,
        ),
        (r#"{"context": 1024, "scaling": {"type": "yarn", "factor": 4.0}}"#, 1024, [1.0, 4.0], natural),
        (
            r#"{"context": 1024, "scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 2.0}}"#,
            1024,
            [1.0, 4.0],
            2.0,
        ),
        (
            r#"{"context": 1024, "scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}}"#,
            1024,
            [1.0, 4.0],
            1.0,
        ),
        (r#"{"context": 1024, "scaling": {"type": "yarn", "factor": 0.5}}"#, 1024, [1.0, 0.5], 1.0),
    ] {
        let spec = read(serde_json::from_str(found).unwrap()).unwrap();
        assert_eq!((spec.context, spec.rope.magnitude), (context, magnitude), "{found}");
        let plain = Rope { scaling: RopeScaling::None, ..spec.rope.clone() }.frequencies();
        let share: Vec<f64> = plain.iter().zip(spec.rope.frequencies()).map(|(plain, is)| plain / is).collect();
        assert_eq!([share[0], share[15]], divisors, "{found}");
    }
    for (kind, context, expect) in [("longrope", 4096, 3.0), ("su", 1024, 2.0)] {
        let more = serde_json::json!({"context": context, "beside": 1024, "scaling": longrope(kind)});
        let spec = read(more).unwrap();
        assert_eq!(spec.rope.scaling, RopeScaling::Divided(factors(expect)), "{kind}");
        assert_eq!(spec.rope.magnitude > 1.0, context > 1024, "{kind}: {}", spec.rope.magnitude);
    }
    let mut short = longrope("longrope");
    short["long_factor"] = vec![1.0; 15].into();
    let error = read(serde_json::json!({"context": 4096, "beside": 1024, "scaling": short})).unwrap_err().to_string();
    assert!(error.contains("a list of positive numbers, one for every two elements that are turned"), "{error}");
    let error = read(serde_json::json!({"context": 4096, "scaling": longrope("su")})).unwrap_err().to_string();
    assert!(error.contains("lacks original_max_position_embeddings"), "{error}");
}
