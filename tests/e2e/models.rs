//! The demo written as a GGUF file speaks as the demo does: one file in, the same tokens and the same prompt out.
//!
//! Written here, because the file is 11 MB and everything in it is in the repository already.

use std::path::{Path, PathBuf};

use pointsman_tests::Host;
use serde_json::{Value, json};

fn demo(file: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../host/app/demo");
    std::fs::read(folder.join(file)).expect("a file of the demo")
}

fn text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The metadata as it is written: numbers are `u32`, or `f32` where they have a fraction.
fn entry(key: &str, value: &Value, out: &mut Vec<u8>) {
    text(key, out);
    match value {
        Value::String(value) => {
            out.extend(8u32.to_le_bytes());
            text(value, out);
        }
        Value::Bool(value) => out.extend([7, 0, 0, 0, u8::from(*value)]),
        Value::Array(all) => {
            let kind = if all[0].is_string() { 8u32 } else { 5 };
            out.extend([9u32.to_le_bytes(), kind.to_le_bytes()].concat());
            out.extend((all.len() as u64).to_le_bytes());
            for value in all {
                match value.as_str() {
                    Some(value) => text(value, out),
                    None => out.extend((value.as_i64().expect("a number") as i32).to_le_bytes()),
                }
            }
        }
        value => match value.as_u64() {
            Some(value) => out.extend([4u32.to_le_bytes(), (value as u32).to_le_bytes()].concat()),
            None => out.extend([6u32.to_le_bytes(), (value.as_f64().expect("a number") as f32).to_le_bytes()].concat()),
        },
    }
}

/// What a converter would write for the demo.
fn metadata() -> Vec<(&'static str, Value)> {
    let tokenizer: Value = serde_json::from_slice(&demo("tokenizer.json")).expect("JSON");
    let config: Value = serde_json::from_slice(&demo("tokenizer_config.json")).expect("JSON");
    let vocab = tokenizer["model"]["vocab"].as_object().expect("a vocabulary");
    let mut tokens = vec![""; vocab.len()];
    vocab.iter().for_each(|(token, id)| tokens[id.as_u64().expect("an id") as usize] = token);
    let mut kinds = vec![1; tokens.len()];
    for added in tokenizer["added_tokens"].as_array().expect("a list") {
        kinds[added["id"].as_u64().expect("an id") as usize] = 3;
    }
    let merge = |merge: &Value| match merge.as_array() {
        Some(pair) => format!("{} {}", pair[0].as_str().expect("text"), pair[1].as_str().expect("text")),
        None => merge.as_str().expect("text").to_owned(),
    };
    let merges: Vec<String> = tokenizer["model"]["merges"].as_array().expect("a list").iter().map(merge).collect();
    vec![
        ("general.architecture", "llama".into()),
        ("llama.block_count", 7.into()),
        ("llama.context_length", 1024.into()),
        ("llama.embedding_length", 256.into()),
        ("llama.feed_forward_length", 704.into()),
        ("llama.attention.head_count", 8.into()),
        ("llama.attention.head_count_kv", 4.into()),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5.into()),
        ("llama.rope.dimension_count", 32.into()),
        ("llama.rope.freq_base", 10_000.0.into()),
        ("tokenizer.ggml.model", "gpt2".into()),
        ("tokenizer.ggml.pre", "gpt-2".into()),
        ("tokenizer.ggml.tokens", tokens.into()),
        ("tokenizer.ggml.token_type", kinds.into()),
        ("tokenizer.ggml.merges", merges.into()),
        ("tokenizer.ggml.bos_token_id", 0.into()),
        ("tokenizer.ggml.eos_token_id", 1.into()),
        ("tokenizer.ggml.eot_token_id", 5.into()),
        ("tokenizer.ggml.add_bos_token", true.into()),
        ("tokenizer.chat_template", config["chat_template"].clone()),
    ]
}

/// The demo's tensors: name and sizes as a GGUF file has them, the number of the type, bytes.
fn tensors() -> Vec<(String, Vec<u64>, u32, Vec<u8>)> {
    let file = demo("demo/model.safetensors");
    let head = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let index: Value = serde_json::from_slice(&file[8..8 + head]).expect("JSON");
    let number = |value: &Value| value.as_u64().expect("a number");
    let mut all = Vec::new();
    for (name, info) in index.as_object().expect("an object").iter().filter(|(name, _)| *name != "__metadata__") {
        let at = |i: usize| 8 + head + number(&info["data_offsets"][i]) as usize;
        let mut bytes = file[at(0)..at(1)].to_vec();
        let mut sizes: Vec<u64> = info["shape"].as_array().expect("a list").iter().map(number).collect();
        if name.contains("q_proj") || name.contains("k_proj") {
            // Rows of a head, 32 of 512 bytes, alternate between its halves.
            let row = |i: usize| (i / 32 * 32 + i % 2 * 16 + i % 32 / 2) * 512;
            bytes = (0..bytes.len() / 512).flat_map(|i| bytes[row(i)..row(i) + 512].to_vec()).collect();
        }
        sizes.reverse();
        let mut renamed = name.replace("model.layers", "blk");
        for (from, to) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ] {
            renamed = renamed.replace(from, to);
        }
        all.push((renamed, sizes, if info["dtype"] == "F32" { 0 } else { 1 }, bytes));
    }
    all
}

fn write(path: &Path) {
    let (metadata, tensors) = (metadata(), tensors());
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    metadata.iter().for_each(|(key, value)| entry(key, value, &mut out));
    let mut offset = 0u64;
    for (name, sizes, kind, bytes) in &tensors {
        text(name, &mut out);
        out.extend((sizes.len() as u32).to_le_bytes());
        sizes.iter().for_each(|size| out.extend(size.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (bytes.len() as u64).next_multiple_of(32);
    }
    for (.., bytes) in &tensors {
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(bytes);
    }
    std::fs::write(path, out).expect("a temporary file");
}

#[test]
fn one_gguf_file_is_a_model() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path: PathBuf = folder.path().join("copy.gguf");
    write(&path);
    let config = format!("[models]\ncopy = {:?}\n", path.display().to_string());
    let host = Host::configured(env!("CARGO_BIN_EXE_pointsman-under-test"), &config);
    for question in ["What is a trait?", "  two  spaces \u{1f980}\n", "<|user|> is a token"] {
        let ask = |model: &str| {
            let message = json!([{ "role": "user", "content": question }]);
            let body = json!({ "model": model, "messages": message, "max_tokens": 40, "temperature": 0 });
            let answer = host.post("/v1/chat/completions", &body);
            assert_eq!(answer.status, 200, "{answer:?}");
            (answer.body["choices"][0].clone(), answer.body["usage"]["prompt_tokens"].clone())
        };
        assert_eq!(ask("demo:f16"), ask("copy:f16"), "{question:?}");
    }
}
