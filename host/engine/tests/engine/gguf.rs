//! GGUF files: the bits of the same weights in safetensors, quantised types against what they stand for, and broken files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use pointsman_engine::gguf::Value;
use pointsman_engine::{ComputePool, CpuEngine, EngineConfig, LoadError, Model, ModelSpec, Precision, Weights};
use safetensors::Dtype;
use serde_json::Value as Json;

use crate::common::{Named, Rng, generate, serialize};
use crate::convert::{self, Tensors, rounded};
use crate::gguf_file::{self, File};

fn golden(name: &str) -> (Json, Tensors) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let mut config: Json = serde_json::from_slice(&config).unwrap();
    // What the format has no key for.
    match name {
        "mistral" => config["sliding_window"] = Json::Null,
        "qwen2" => config["use_sliding_window"] = false.into(),
        "gemma2" | "gemma3" => config["query_pre_attn_scalar"] = config["head_dim"].clone(),
        _ => {}
    }
    (config, convert::tensors(&folder))
}

fn open(bytes: &[u8]) -> Result<Weights, LoadError> {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Weights::open(&path)
}

fn load(spec: ModelSpec, weights: &Weights) -> Arc<Model> {
    Arc::new(Model::load(spec, weights, Precision::F16).unwrap())
}

/// Logits after 20 tokens, and five more.
fn logits(model: &Arc<Model>) -> Vec<f32> {
    let context_tokens = model.spec().context.min(256);
    let config = EngineConfig { n_blocks: 20, block_tokens: 16, max_step_tokens: 64, max_rows: 1, context_tokens };
    let mut engine = CpuEngine::new(Arc::clone(model), ComputePool::start(1).unwrap(), config).unwrap();
    let prompt = Rng(5).tokens(20, model.spec().vocab.min(64));
    generate(&mut engine, &prompt, 64, 5).1.concat().into_iter().map(f32::from_bits).collect()
}

/// The model whose values are those of the blocks, from safetensors in 32 bits.
fn reference(config: &Json, tensors: &Tensors, dtype: impl Fn(&str) -> GgmlDType) -> Arc<Model> {
    let named = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
        let k = *shape.last().unwrap();
        let plain = shape.len() == 1 || name.ends_with("mlp.gate.weight") || name.ends_with("moe.gate.weight");
        let values = if plain { values.clone() } else { rounded(values, k, dtype(name)) };
        Named { name: name.clone(), shape: shape.clone(), values }
    };
    let named: Vec<Named> = tensors.iter().map(named).collect();
    let weights = Weights::from_bytes(serialize(&named, Dtype::F32)).unwrap();
    load(ModelSpec::from_config(&serde_json::to_vec(config).unwrap()).unwrap(), &weights)
}

fn from_file(file: &File) -> Arc<Model> {
    let weights = open(&file.write()).unwrap();
    load(ModelSpec::from_gguf(&weights).unwrap(), &weights)
}

#[test]
fn floats_give_the_bits_of_safetensors() {
    let families = ["llama", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "phi3", "gemma2", "gemma3"];
    for name in families.into_iter().chain(["qwen3-yarn", "phi3-longrope"]) {
        let (config, tensors) = golden(name);
        for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16] {
            let found = logits(&from_file(&convert::file(&config, &tensors, |_| dtype)));
            let expect = logits(&reference(&config, &tensors, |_| dtype));
            // What stretches their frequencies the converter rounded to 32 bits.
            match name {
                "llama3" | "phi3-longrope" => {
                    assert!(distance(&found, &expect) < 3e-6, "{dtype:?}: {}", distance(&found, &expect))
                }
                _ => assert!(found.iter().zip(&expect).all(|(a, b)| a.to_bits() == b.to_bits()), "{name} {dtype:?}"),
            }
        }
    }
}

#[test]
fn quantised_biases_are_those_of_their_blocks() {
    let (config, tensors) = golden("llama");
    let plain = convert::file(&config, &tensors, |_| GgmlDType::F32);
    let bare = logits(&from_file(&plain));
    let with_biases = |dtype: GgmlDType, values: fn(&[f32]) -> Vec<f32>| {
        let mut file = convert::file(&config, &tensors, |_| GgmlDType::F32);
        let layers = config["num_hidden_layers"].as_u64().unwrap();
        for name in (0..layers).flat_map(|i| ["q", "k", "v"].map(|part| format!("blk.{i}.attn_{part}.bias"))) {
            let matrix = name.replace("bias", "weight");
            let n = file.tensors.iter().find(|tensor| tensor.name == matrix).unwrap().sizes[1];
            let random: Vec<f32> = (0..n).map(|i| ((i * 37 + n) % 64) as f32 / 64.0 - 0.5).collect();
            let bytes = convert::quantised(&values(&random), n as usize, dtype);
            let kind = convert::TYPES.iter().find(|(known, _)| *known == dtype).unwrap().1;
            file.tensors.push(gguf_file::Tensor { name, sizes: vec![n], kind, bytes });
        }
        logits(&from_file(&file))
    };
    let found = with_biases(GgmlDType::Q8_0, <[f32]>::to_vec);
    let expect = with_biases(GgmlDType::F32, |values| rounded(values, values.len(), GgmlDType::Q8_0));
    assert!(found.iter().zip(&expect).all(|(a, b)| a.to_bits() == b.to_bits()), "the same numbers in blocks");
    assert!(distance(&found, &bare) > 1e-3, "they count");
}

#[test]
fn a_description_that_cannot_be_served_is_told_by_its_key() {
    type Break = fn(&mut File);
    let cases: [(Break, &str); 11] = [
        (
            |f| f.metadata.clear(),
            "the file's metadata lacks general.architecture; it must be the name of an architecture",
        ),
        (
            |f| f.set("general.architecture", gguf_file::Value::Text("mamba".into())),
            "has general.architecture = mamba, which is not supported; supported: llama, qwen2, qwen3, qwen3moe, phi3",
        ),
        (|f| f.metadata.retain(|(key, _)| key != "llama.block_count"), "lacks llama.block_count; it must be a whole"),
        (
            |f| f.set("llama.block_count", gguf_file::Value::U32(5000)),
            "llama.block_count = 5000; it must be at most 4096",
        ),
        (|f| f.set("llama.context_length", gguf_file::Value::F32(f32::NAN)), "llama.context_length = \"NaN\"; it must"),
        (
            |f| f.set("llama.attention.key_length", gguf_file::Value::U32(40)),
            "attention.value_length = 32, which is not",
        ),
        (
            |f| f.set("llama.rope.dimension_count", gguf_file::Value::U32(33)),
            "llama.rope.dimension_count = 33, which is",
        ),
        (
            |f| f.set("llama.rope.scaling.type", gguf_file::Value::Text("dynamic".into())),
            "llama.rope.scaling.type = {\"rope_type\":\"dynamic\"",
        ),
        (|f| f.set("llama.attention.causal", gguf_file::Value::Flag(false)), "attention.causal = false, which is not"),
        (|f| f.set("llama.expert_used_count", gguf_file::Value::U32(2)), ""),
        (|f| f.tensors.retain(|t| t.name != "token_embd.weight"), "lacks token_embd.weight; it must be"),
    ];
    for (change, expect) in cases {
        let mut file = small();
        change(&mut file);
        match ModelSpec::from_gguf(&open(&file.write()).unwrap()) {
            Ok(_) => assert_eq!(expect, ""),
            Err(error) => assert!(error.to_string().contains(expect) && !expect.is_empty(), "{error}"),
        }
    }
}

/// A Llama wide enough for blocks of 256.
fn wide() -> (Json, Tensors) {
    let config = serde_json::json!({"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "intermediate_size": 256, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": true});
    let spec = ModelSpec::from_config(&serde_json::to_vec(&config).unwrap()).unwrap();
    let tensors = crate::common::tensors(&spec, Dtype::F32, 11);
    (config, tensors.into_iter().map(|t| (t.name, (t.shape, t.values))).collect())
}

fn distance(found: &[f32], expect: &[f32]) -> f32 {
    let off: f32 = found.iter().zip(expect).map(|(a, b)| (a - b).powi(2)).sum();
    (off / expect.iter().map(|x| x * x).sum::<f32>()).sqrt()
}

#[test]
fn quantised_types_are_near_what_they_stand_for() {
    let (config, tensors) = wide();
    let mixed = |name: &str| match name {
        name if name.contains("attn_v") || name.contains("v_proj") => GgmlDType::Q6K,
        name if name.contains("ffn_gate") || name.contains("gate_proj") => GgmlDType::F16,
        _ => GgmlDType::Q4K,
    };
    for (dtype, _) in convert::TYPES {
        let found = logits(&from_file(&convert::file(&config, &tensors, |_| dtype)));
        let off = distance(&found, &logits(&reference(&config, &tensors, |_| dtype)));
        println!("{dtype:?}: {off:.1e}");
        // Products of blocks may round activations to 8 bits, half a percent each.
        assert!(off < 0.05, "{dtype:?}: off by {off}");
    }
    let found = logits(&from_file(&convert::file(&config, &tensors, mixed)));
    let off = distance(&found, &logits(&reference(&config, &tensors, mixed)));
    assert!(off < 0.05, "mixed: off by {off}");
}

#[test]
fn eight_bits_are_taken_as_they_are() {
    let (config, tensors) = wide();
    let file = convert::file(&config, &tensors, |_| GgmlDType::Q8_0);
    let found = logits(&from_file(&file));
    // Quantised at load from the same numbers.
    let named = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| Named {
        name: name.clone(),
        shape: shape.clone(),
        values: values.clone(),
    };
    let named: Vec<Named> = tensors.iter().map(named).collect();
    let weights = Weights::from_bytes(serialize(&named, Dtype::F32)).unwrap();
    let spec = ModelSpec::from_config(&serde_json::to_vec(&config).unwrap()).unwrap();
    let expect = logits(&Arc::new(Model::load(spec, &weights, Precision::Q8_0).unwrap()));
    assert!(found.iter().zip(&expect).all(|(a, b)| a.to_bits() == b.to_bits()));
}

fn small() -> File {
    let (config, tensors) = golden("llama");
    let mut file = convert::file(&config, &tensors, |_| GgmlDType::BF16);
    file.set("list", gguf_file::Value::Texts(vec!["a".into(), "\u{e9}".into()]));
    file.set("signed", gguf_file::Value::I32s(vec![-1, 7]));
    file.set("flag", gguf_file::Value::Flag(true));
    file.set("reals", gguf_file::Value::F32s(vec![0.5]));
    file
}

#[test]
fn metadata_is_read_and_candle_reads_the_same() {
    let bytes = small().write();
    let weights = open(&bytes).unwrap();
    let list = |key: &str| match weights.metadata(key) {
        Some(Value::List(list)) => list.iter().collect::<Vec<_>>(),
        other => panic!("{key}: {other:?}"),
    };
    assert_eq!(weights.metadata("general.architecture"), Some(Value::Text("llama".into())));
    assert_eq!(weights.metadata("llama.block_count"), Some(Value::Whole(3)));
    assert_eq!(weights.metadata("flag"), Some(Value::Flag(true)));
    assert_eq!(list("list"), [Value::Text("a".into()), Value::Text("\u{e9}".into())]);
    assert_eq!(list("signed"), [Value::Whole(-1), Value::Whole(7)]);
    assert_eq!(list("reals"), [Value::Real(0.5)]);
    assert_eq!(weights.metadata("nothing"), None);
    let theirs = candle_core::quantized::gguf_file::Content::read(&mut std::io::Cursor::new(&bytes)).unwrap();
    assert_eq!(theirs.metadata.len(), small().metadata.len());
    assert_eq!(theirs.tensor_infos.len(), small().tensors.len());
}

#[test]
fn broken_files_are_told_what_is_wrong_with_them() {
    type Break = fn(&mut File);
    let raw = |kind, bytes: &[u8]| gguf_file::Value::Raw(kind, bytes.to_vec());
    let cases: [(Break, &str); 9] = [
        (|f| f.set("general.alignment", gguf_file::Value::U32(0)), "general.alignment is not a power of two from 8"),
        (|f| f.set("general.alignment", gguf_file::Value::F32(32.0)), "general.alignment is not a power of two from 8"),
        (|f| f.metadata.push(("flag".into(), gguf_file::Value::Flag(false))), "key flag is there twice"),
        (|f| f.tensors.push(f.tensors[2].clone()), "tensor blk.0.ffn_down.weight is there twice"),
        (|f| f.tensors[0].sizes = vec![32; 5], "sizes of a tensor of 5; at most 4 are supported"),
        (|f| f.tensors[0].sizes = vec![1 << 40, 1 << 40], "their product must be from 1 to 2^48"),
        (|f| f.tensors[0].sizes[0] = 0, "their product must be from 1 to 2^48"),
        (
            |f| (f.tensors[0].kind, f.tensors[0].sizes[0]) = (12, 64),
            "the first must be a multiple of the values in a block",
        ),
        (|f| f.tensors[3].sizes[1] <<= 30, "tensor blk.0.ffn_gate.weight lies at bytes"),
    ];
    for (change, expect) in cases {
        let mut file = small();
        change(&mut file);
        let error = open(&file.write()).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
        assert!(error.contains("model.gguf"), "{error}");
    }
    for (value, expect) in [
        (raw(13, &[]), "the value of odd is of type 13"),
        (raw(9, &[9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), "the value of odd is of type 9"),
        (raw(8, &[255; 8]), "it ends within the value of odd: 18446744073709551615 bytes are needed"),
        (raw(9, &[[8, 0, 0, 0].as_slice(), &[255; 8]].concat()), "it ends within the value of odd"),
        (raw(9, &[[4, 0, 0, 0].as_slice(), &[255; 8]].concat()), "it ends within the value of odd"),
    ] {
        let mut file = small();
        file.set("odd", value);
        let error = open(&file.write()).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
    let good = small().write();
    for (at, bytes, expect) in [
        (0, b"GGML".as_slice(), "does not begin with GGUF"),
        (4, &[1, 0, 0, 0], "of version 1; supported are 2 and 3"),
        (4, &[0, 0, 0, 3], "of version 50331648; supported are 2 and 3, little-endian"),
        (8, &[255; 8], "claims tensors of 18446744073709551615; at most 131072"),
        (16, &[255; 8], "claims keys of 18446744073709551615; at most 16384"),
        (24, &[255; 8], "claims bytes of a name of 18446744073709551615; at most 512"),
        (32, &[255], "key 0 is not UTF-8"),
    ] {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        let error = open(&file).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
}

#[test]
fn a_tensor_that_does_not_fit_is_named_as_in_the_file() {
    type Break = fn(&mut File);
    let cases: [(Break, &str); 4] = [
        (
            |f| f.tensors.retain(|t| !t.name.contains("attn_k")),
            "tensor blk.0.attn_k.weight of shape [32, 32] is missing",
        ),
        (
            |f| f.tensors[0].sizes = vec![64, 16],
            "tensor blk.0.attn_k.weight has shape [16, 64], the configuration asks",
        ),
        (|f| f.tensors[0].kind = 23, "tensor blk.0.attn_k.weight of shape [32, 32] is IQ4_XS; supported are F32, F16"),
        (
            |f| f.tensors[0].bytes[..2].fill(255),
            "tensor blk.0.attn_k.weight holds a value that is not finite at element 0",
        ),
    ];
    for (change, expect) in cases {
        let mut file = small();
        file.tensors.sort_by_key(|t| !t.name.contains("blk.0.attn_k."));
        change(&mut file);
        let weights = open(&file.write()).unwrap();
        let spec = ModelSpec::from_gguf(&open(&small().write()).unwrap()).unwrap();
        let error = Model::load(spec, &weights, Precision::F16).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
}

/// Every beginning of a file, and files with a few wrong bytes: an error or a good file, never a panic.
#[test]
fn damaged_files_never_panic() {
    let mut file = small();
    file.tensors.truncate(3);
    let good = file.write();
    let head = good.len() - file.tensors.iter().map(|t| t.bytes.len()).sum::<usize>();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let attempt = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let weights = Weights::open(&path)?;
        file.metadata.iter().filter_map(|(key, _)| weights.metadata(key)).for_each(|value| {
            if let Value::List(list) = value {
                assert!(list.iter().count() <= list.len());
            }
        });
        Ok::<_, LoadError>(())
    };
    attempt(&good).unwrap();
    for len in 0..head {
        assert!(attempt(&good[..len]).is_err(), "{len} bytes");
    }
    let mut rng = Rng(99);
    for _ in 0..3_000 {
        let mut bytes = good.clone();
        for _ in 0..=rng.below(3) {
            bytes[rng.below(head as u64) as usize] = rng.below(256) as u8;
        }
        let _ = attempt(&bytes);
    }
}
