//! A model of any size without a download: random numbers in the shape of a Llama, with the demo's tokenizer.
//!
//! What it says is nonsense; what it takes to load, hold and free is what a model of that size takes.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::root;

/// Sizes of a model; heads are 32 wide, and a quarter of them have keys and values.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width of the feed-forward half.
    pub ffn: u64,
    /// Layers.
    pub layers: u64,
}

/// Tokens of the demo's tokenizer.
const VOCAB: u64 = 2_048;

/// Writes a folder that can be served.
///
/// # Panics
/// The folder cannot be written.
pub fn write(folder: &Path, sizes: Sizes) {
    let demo = root().join("host/app/demo");
    let files = [("tokenizer.json", "."), ("tokenizer_config.json", "."), ("generation_config.json", "demo")];
    for (file, from) in files {
        std::fs::copy(demo.join(from).join(file), folder.join(file)).expect("a file of the demo");
    }
    let text = std::fs::read_to_string(demo.join("demo/config.json")).expect("a file of the demo");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    for (key, value) in [
        ("hidden_size", sizes.hidden),
        ("intermediate_size", sizes.ffn),
        ("num_hidden_layers", sizes.layers),
        ("num_attention_heads", sizes.hidden / 32),
        ("num_key_value_heads", sizes.hidden / 128),
    ] {
        config[key] = value.into();
    }
    std::fs::write(folder.join("config.json"), config.to_string()).expect("a file");
    std::fs::write(folder.join("model.safetensors"), weights(sizes)).expect("a file");
}

fn weights(sizes: Sizes) -> Vec<u8> {
    let (mut index, mut end) = (Map::new(), 0);
    for (name, shape) in tensors(sizes) {
        let begin = end;
        end += 2 * shape.iter().product::<u64>();
        index.insert(name, json!({"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}));
    }
    let head = Value::Object(index).to_string();
    let mut bytes = (head.len() as u64).to_le_bytes().to_vec();
    bytes.extend(head.as_bytes());
    // 0x2000 to 0x23ff are the halves from 1/128 to 1/64.
    let half = |i: u64| (0x2000 + i * 40_503 % 1_024 + ((i % 2) << 15)) as u16;
    bytes.extend((0..end / 2).flat_map(|i| half(i).to_le_bytes()));
    bytes
}

fn tensors(Sizes { hidden, ffn, layers }: Sizes) -> Vec<(String, Vec<u64>)> {
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, hidden])];
    all.push(("model.norm.weight".into(), vec![hidden]));
    for layer in 0..layers {
        for (part, shape) in [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden / 4, hidden]),
            ("self_attn.v_proj", vec![hidden / 4, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![ffn, hidden]),
            ("mlp.up_proj", vec![ffn, hidden]),
            ("mlp.down_proj", vec![hidden, ffn]),
        ] {
            all.push((format!("model.layers.{layer}.{part}.weight"), shape));
        }
    }
    all
}
