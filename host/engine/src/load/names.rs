//! What tensors are called in GGUF files, by their names in Hugging Face checkpoints.
//!
//! One table, so that a model definition asks by one name whatever the file, and an error tells the name that the file would use.

/// Parts of a layer, without `.weight` and `.bias`.
const PARTS: [(&str, &str); 19] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.experts.gate_proj", "ffn_gate_exps"),
    ("mlp.experts.up_proj", "ffn_up_exps"),
    ("mlp.experts.down_proj", "ffn_down_exps"),
    ("mlp.experts.gate_up_proj", "ffn_gate_up_exps"),
];

/// The name in a file whose architecture norms the result of each half of a layer, or does not: `post_attention_layernorm` stands
/// before the feed-forward half where it does not.
pub(super) fn in_gguf(name: &str, post_norms: bool) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".to_owned(),
        "model.norm.weight" => return "output_norm.weight".to_owned(),
        "lm_head.weight" => return "output.weight".to_owned(),
        _ => {}
    }
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let Some((layer, (part, kind))) = layer.and_then(|(layer, rest)| Some((layer, rest.rsplit_once('.')?))) else {
        return name.to_owned();
    };
    let part = match part {
        "post_attention_layernorm" if post_norms => "post_attention_norm",
        "post_attention_layernorm" => "ffn_norm",
        other => PARTS.iter().find(|(name, _)| *name == other).map_or(other, |(_, name)| name),
    };
    format!("blk.{layer}.{part}.{kind}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_translated() {
        for (name, post_norms, expect) in [
            ("model.embed_tokens.weight", false, "token_embd.weight"),
            ("model.layers.3.self_attn.q_proj.bias", false, "blk.3.attn_q.bias"),
            ("model.layers.10.post_attention_layernorm.weight", false, "blk.10.ffn_norm.weight"),
            ("model.layers.10.post_attention_layernorm.weight", true, "blk.10.post_attention_norm.weight"),
            ("model.layers.10.pre_feedforward_layernorm.weight", true, "blk.10.ffn_norm.weight"),
            ("model.layers.0.mlp.experts.down_proj.weight", false, "blk.0.ffn_down_exps.weight"),
            ("rope_freqs.weight", false, "rope_freqs.weight"),
        ] {
            assert_eq!(super::in_gguf(name, post_norms), expect);
        }
    }
}
