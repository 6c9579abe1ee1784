//! Sentence encoders against `transformers` (`tests/encoders/make.py`), against themselves in other batches, and against
//! folders that they cannot serve.

use std::path::{Path, PathBuf};

use pointsman_engine::{ComputePool, Encoder, EncoderSpec, Pooling, Weights};

#[derive(serde::Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    tokens: Vec<u32>,
    mean: Vec<f32>,
    first: Vec<f32>,
}

const FAMILIES: [&str; 2] = ["bert", "xlm-roberta"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/encoders").join(name)
}

fn golden(name: &str) -> Golden {
    serde_json::from_slice(&std::fs::read(folder(name).join("golden.json")).unwrap()).unwrap()
}

fn load(name: &str, pooling: Pooling, normalised: bool) -> Encoder {
    let spec = EncoderSpec { pooling, normalised, ..EncoderSpec::open(&folder(name)).unwrap() };
    Encoder::load(spec, &Weights::open(&folder(name)).unwrap(), ComputePool::start(2).unwrap(), 128).unwrap()
}

fn length(x: &[f32]) -> f32 {
    x.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// Relative L2 distance.
fn distance(found: &[f32], expect: &[f32]) -> f32 {
    assert_eq!(found.len(), expect.len());
    let off: Vec<f32> = found.iter().zip(expect).map(|(a, b)| a - b).collect();
    length(&off) / length(expect)
}

#[test]
fn vectors_are_those_of_transformers() {
    for name in FAMILIES {
        let golden = golden(name);
        let batch: Vec<&[u32]> = golden.cases.iter().map(|case| &*case.tokens).collect();
        for pooling in [Pooling::Mean, Pooling::First] {
            for (case, found) in golden.cases.iter().zip(load(name, pooling, false).encode(&batch).unwrap()) {
                let expect = if pooling == Pooling::Mean { &case.mean } else { &case.first };
                let off = distance(&found, expect);
                assert!(off < 1e-5, "{name}, {} tokens, {pooling:?}: off by {off}", case.tokens.len());
            }
        }
        for (case, found) in golden.cases.iter().zip(load(name, Pooling::Mean, true).encode(&batch).unwrap()) {
            let expect: Vec<f32> = case.mean.iter().map(|x| x / length(&case.mean)).collect();
            assert!((length(&found) - 1.0).abs() < 1e-6 && distance(&found, &expect) < 1e-5, "{name}, normalised");
        }
    }
}

#[test]
fn a_text_has_the_same_bits_in_every_batch() {
    let golden = golden("bert");
    let mut encoder = load("bert", Pooling::Mean, true);
    let tokens: Vec<&[u32]> = golden.cases.iter().map(|case| &*case.tokens).collect();
    let alone: Vec<Vec<f32>> = tokens.iter().map(|&one| encoder.encode(&[one]).unwrap().remove(0)).collect();
    for turn in 0..tokens.len() {
        let batch: Vec<&[u32]> = (0..tokens.len()).map(|i| tokens[(i + turn) % tokens.len()]).take(1 + turn).collect();
        for (i, found) in encoder.encode(&batch).unwrap().iter().enumerate() {
            assert_eq!(found, &alone[(i + turn) % tokens.len()], "text {i} of {}, turned by {turn}", batch.len());
        }
    }
    assert!(encoder.encode(&[]).unwrap().is_empty());
}

#[test]
fn batches_that_were_not_promised_are_refused() {
    let mut encoder = load("bert", Pooling::Mean, true);
    let long = [3; 41];
    for (batch, expect) in [
        (vec![&[][..]], "empty or too long"),
        (vec![&long[..]], "empty or too long"),
        (vec![&long[..40]; 4], "more tokens than batch_tokens"),
        (vec![&[64][..]], "outside the vocabulary"),
    ] {
        let error = encoder.encode(&batch).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
}

/// A folder with the golden's config, changed, and these files.
fn described(config: &[(&str, serde_json::Value)], files: &[(&str, &str)]) -> Result<EncoderSpec, String> {
    let made = tempfile::tempdir().unwrap();
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder("bert").join("config.json")).unwrap()).unwrap();
    config.iter().for_each(|(field, value)| json[*field] = value.clone());
    std::fs::write(made.path().join("config.json"), json.to_string()).unwrap();
    std::fs::create_dir(made.path().join("1_Pooling")).unwrap();
    files.iter().for_each(|(file, text)| std::fs::write(made.path().join(file), text).unwrap());
    EncoderSpec::open(made.path()).map_err(|error| error.to_string())
}

/// `modules.json` with these modules.
fn modules(kinds: &[(&str, &str)]) -> String {
    let module = |(i, (kind, path)): (usize, &(&str, &str))| {
        serde_json::json!({"idx": i, "name": i.to_string(), "path": path,
            "type": format!("sentence_transformers.models.{kind}")})
    };
    serde_json::Value::Array(kinds.iter().enumerate().map(module).collect()).to_string()
}

#[test]
fn a_folder_says_how_to_pool_and_how_long_a_text_may_be() {
    let plain = modules(&[("Transformer", ""), ("Pooling", "1_Pooling")]);
    let normed = modules(&[("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]);
    let cls = r#"{"word_embedding_dimension": 32, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#;
    let mean = r#"{"embedding_dimension": 32, "pooling_mode": "mean"}"#;
    let sentence = |n: &str| format!(r#"{{"max_seq_length": {n}, "do_lower_case": false}}"#);
    type Case<'a> = (&'a [(&'a str, &'a str)], (Pooling, bool, usize));
    let cases: [Case<'_>; 4] = [
        (&[], (Pooling::Mean, true, 40)),
        (&[("modules.json", &plain), ("1_Pooling/config.json", cls)], (Pooling::First, false, 40)),
        (
            &[
                ("modules.json", &normed),
                ("1_Pooling/config.json", mean),
                ("sentence_bert_config.json", &sentence("24")),
            ],
            (Pooling::Mean, true, 24),
        ),
        (&[("sentence_bert_config.json", &sentence("null"))], (Pooling::Mean, true, 40)),
    ];
    for (files, expect) in cases {
        let spec = described(&[], files).unwrap();
        assert_eq!((spec.pooling, spec.normalised, spec.max_tokens), expect, "{files:?}");
    }
    let roberta = EncoderSpec::open(&folder("xlm-roberta")).unwrap();
    assert_eq!((roberta.first_position, roberta.max_tokens), (2, 40));
}

#[test]
fn folders_that_cannot_be_served_are_named() {
    let dense = modules(&[("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]);
    let away = modules(&[("Transformer", ""), ("Pooling", "../1_Pooling")]);
    let good = modules(&[("Transformer", ""), ("Pooling", "1_Pooling")]);
    let lasttoken = r#"{"pooling_mode_lasttoken": true}"#;
    type Case<'a> = (&'a [(&'a str, serde_json::Value)], &'a [(&'a str, &'a str)], &'a str);
    let cases: [Case<'_>; 9] = [
        (&[("position_embedding_type", "relative_key".into())], &[], "position_embedding_type = \"relative_key\""),
        (&[("hidden_act", "relu".into())], &[], "supported: gelu, gelu_new, gelu_pytorch_tanh"),
        (&[("num_attention_heads", 4.into())], &[], "num_attention_heads = 4"),
        (&[("intermediate_size", 72.into())], &[], "intermediate_size = 72, which is not supported"),
        (&[], &[("modules.json", &dense)], "modules.json has Transformer, Pooling, Dense"),
        (&[], &[("modules.json", &away)], "modules.json has the path \"../1_Pooling\""),
        (&[], &[("modules.json", &good)], "config.json of Pooling has nothing"),
        (&[], &[("modules.json", &good), ("1_Pooling/config.json", lasttoken)], "pooling_mode_lasttoken"),
        (&[], &[("sentence_bert_config.json", r#"{"max_seq_length": 9, "do_lower_case": true}"#)], "do_lower_case"),
    ];
    for (config, files, expect) in cases {
        let error = described(config, files).unwrap_err();
        assert!(error.contains(expect), "{error} does not contain {expect}");
    }
    let config = std::fs::read(folder("bert").join("config.json")).unwrap();
    assert!(EncoderSpec::describes(&config) && !EncoderSpec::describes(br#"{"architectures": ["LlamaForCausalLM"]}"#));
    let spec = EncoderSpec { layers: 4, ..EncoderSpec::open(&folder("bert")).unwrap() };
    let loaded = Encoder::load(spec, &Weights::open(&folder("bert")).unwrap(), ComputePool::start(1).unwrap(), 1);
    let error = loaded.unwrap_err().to_string();
    assert!(error.contains("encoder.layer.3.attention.self.query.weight of shape [32, 32] is missing"), "{error}");
}
