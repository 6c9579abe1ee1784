//! Weights that do not fit are refused with the tensor's name, what was expected and what was found.

use pointsman_engine::{LoadError, Model, Precision, Weights};
use safetensors::Dtype;

use crate::common::{Named, serialize, spec, tensors};

fn load(tensors: &[Named], dtype: Dtype) -> Result<Model, LoadError> {
    Model::load(spec(), &Weights::from_bytes(serialize(tensors, dtype))?, Precision::F16)
}

#[test]
fn bad_tensors_are_named() {
    type Break = fn(&mut Vec<Named>);
    let cases: [(Break, &str); 4] = [
        (|t| drop(t.remove(1)), "tensor model.layers.0.input_layernorm.weight of shape [96] is missing"),
        (
            |t| t[2].shape = vec![96, 128],
            "tensor model.layers.0.self_attn.q_proj.weight has shape [96, 128], the configuration asks for [128, 96]",
        ),
        (
            |t| t[0].values[3] = f32::NAN,
            "tensor model.embed_tokens.weight holds a value that is not finite at element 3",
        ),
        (|t| t.truncate(5), "tensor model.layers.0.self_attn.o_proj.weight of shape [96, 128] is missing"),
    ];
    for (change, expect) in cases {
        let mut tensors = tensors(&spec(), Dtype::F32, 1);
        change(&mut tensors);
        let error = load(&tensors, Dtype::F32).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
    let error = load(&tensors(&spec(), Dtype::F32, 1), Dtype::I32).unwrap_err().to_string();
    assert!(
        error.contains("tensor model.embed_tokens.weight of shape [203, 96] is I32; supported are F32, F16"),
        "{error}"
    );
}

#[test]
fn broken_files_are_told_apart_from_missing_ones() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str| Weights::open(&folder.path().join(name)).unwrap_err();
    let whole = serialize(&tensors(&spec(), Dtype::F16, 1), Dtype::F16);
    for (name, bytes) in [("cut", &whole[..whole.len() - 1]), ("head", &whole[..100]), ("text", b"<html>404</html>")] {
        std::fs::write(folder.path().join(name), bytes).unwrap();
        assert!(matches!(open(name), LoadError::Broken { .. }), "{name}: {}", open(name));
    }
    assert!(matches!(open("nothing"), LoadError::Io { .. }));
    assert!(matches!(Weights::open(folder.path()).unwrap_err(), LoadError::NoWeights(_)));
    std::fs::write(folder.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../b"}}"#).unwrap();
    assert!(matches!(Weights::open(folder.path()).unwrap_err(), LoadError::BadShard { .. }));
}

#[test]
fn one_file_a_folder_and_shards_are_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors(&spec(), Dtype::F16, 1);
    let (a, b) = tensors.split_at(7);
    let mut map = serde_json::Map::new();
    for (file, part) in [("a.safetensors", a), ("b.safetensors", b)] {
        std::fs::write(folder.path().join(file), serialize(part, Dtype::F16)).unwrap();
        map.extend(part.iter().map(|t| (t.name.clone(), file.into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let sharded = Model::load(spec(), &Weights::open(folder.path()).unwrap(), Precision::F16).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), serialize(&tensors, Dtype::F16)).unwrap();
    let single = Model::load(spec(), &Weights::open(folder.path()).unwrap(), Precision::F16).unwrap();
    assert_eq!(format!("{sharded:?}"), format!("{single:?}"));
    let eight = Model::load(spec(), &Weights::open(folder.path()).unwrap(), Precision::Q8_0).unwrap();
    // 8.5 bits for 16, but for the norms.
    assert!(eight.bytes() * 16 < single.bytes() * 9, "{} of {}", eight.bytes(), single.bytes());
}
