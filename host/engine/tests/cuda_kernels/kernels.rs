//! Every case of the library, on the shim.

use pointsman_engine::cuda::cases::{attention, experts, memory, model, products, quantised, sampling};

use crate::case::{Element, check_all, close};

#[test]
fn products_in_f32() {
    check_all(products::cases(Element::F32));
}

#[test]
fn products_in_f16() {
    check_all(products::cases(Element::F16));
}

#[test]
fn products_in_bf16() {
    check_all(products::cases(Element::Bf16));
}

#[test]
fn products_of_8_bits_in_f32() {
    check_all(quantised::cases(Element::F32));
}

#[test]
fn products_of_8_bits_in_f16() {
    check_all(quantised::cases(Element::F16));
}

#[test]
fn products_of_8_bits_in_bf16() {
    check_all(quantised::cases(Element::Bf16));
}

#[test]
fn attention_over_pages_in_f32() {
    check_all(attention::cases(Element::F32));
}

#[test]
fn attention_over_pages_in_f16() {
    check_all(attention::cases(Element::F16));
}

#[test]
fn attention_over_pages_in_bf16() {
    check_all(attention::cases(Element::Bf16));
}

#[test]
fn the_small_kernels() {
    check_all(Element::ALL.into_iter().flat_map(model::cases).collect());
}

#[test]
fn experts_are_chosen() {
    check_all(experts::choices());
}

#[test]
fn products_of_experts() {
    check_all(Element::ALL.into_iter().flat_map(experts::cases).collect());
}

#[test]
fn memory_is_moved() {
    check_all(memory::cases());
}

#[test]
fn tokens_are_those_of_a_sampler_that_sorts() {
    check_all(sampling::cases());
}

#[test]
fn the_reference_draws_the_engines_numbers() {
    // Those that the engine's own sampler has on record for seed 42.
    let draws: Vec<u32> = (0..4).map(|i| (sampling::uniform(42, i) * 1e6) as u32).collect();
    assert_eq!(draws, [343_291, 955_746, 486_349, 67_357]);
}

#[test]
fn a_wrong_product_is_seen() {
    let expect = vec![1.0, 2.0, 3.0];
    for (found, is_right) in [
        (vec![1.0, 2.0, 3.0], true),
        (vec![1.0, 2.0, 3.1], false),
        (vec![1.0, f64::NAN, 3.0], false),
        (vec![1.0, 2.0, 3.0 + 2e-5], true),
        (vec![1.0, 2.0, 3.0, 0.0], false),
    ] {
        let outs = [Element::F32.encode(&found)];
        assert_eq!(close(Element::F32, 1e-5, expect.clone())(&outs).is_ok(), is_right, "{found:?}");
    }
}

#[test]
fn one_wrong_value_among_many_is_seen() {
    let expect: Vec<f64> = (0..100_000).map(|i| f64::from(i % 7) - 3.0).collect();
    let check = close(Element::Bf16, 1e-2, expect.clone());
    assert_eq!(check(&[Element::Bf16.encode(&expect)]), Ok(()));
    let mut found = expect;
    found[70_001] += 1.0;
    assert!(check(&[Element::Bf16.encode(&found)]).is_err_and(|said| said.contains("value 70001")));
}
