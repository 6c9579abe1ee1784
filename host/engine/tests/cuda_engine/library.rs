//! Products that a library computes in place of the kernels.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use pointsman_engine::cuda::{CudaEngine, CudaOptions, Element, LibraryUse};
use pointsman_engine::{Activation, CpuEngine, ModelSpec, Precision};
use pointsman_sched::execute::Executor;
use pointsman_sched::sampler::NoEdits;

use crate::common::{Sequence, Step, blocks};
use crate::device::{ShimDevice, ShimLibrary};
use crate::steps::{difference, engines_on, execute, spec, tokens, weights_of};

/// A prompt that a library computes, one that the kernels do, and decodes of both; what each step chose, and the worst difference from
/// the CPU.
fn serve(cpu: &mut CpuEngine, cuda: &mut CudaEngine) -> (usize, f32) {
    let (mut same, mut worst) = (0, 0.0f32);
    for n in [80, 30] {
        let prompt = (0..n).map(|i| (i * 7 + 3) % 203).collect();
        let mut sequence = Sequence { tokens: prompt, computed: 0, blocks: blocks([9, 2, 5, 1, 7, 3]) };
        for _ in 0..2 {
            let mut step = Step::default();
            let left = sequence.tokens.len() - sequence.computed;
            step.push(&sequence, left, &Arc::default());
            sequence.computed += left;
            let expect = tokens(&execute(cpu, &step.plan, &mut NoEdits));
            same += usize::from(tokens(&execute(cuda, &step.plan, &mut NoEdits)) == expect);
            worst = worst.max(difference(cpu, cuda, 0));
            sequence.tokens.extend(expect);
        }
    }
    (same, worst)
}

/// The CPU's engine and one on a device with a library; `None` without a C++ compiler.
fn engines(
    spec: &ModelSpec,
    element: Element,
    library: ShimLibrary,
    how: LibraryUse,
) -> Option<(CpuEngine, CudaEngine)> {
    let mut device = ShimDevice::start()?;
    device.library = Some(library);
    let options = CudaOptions { form: element.into(), graphs: true, library: how };
    Some(engines_on(device, spec, &weights_of(spec, element), options, Precision::F16))
}

#[test]
fn prompts_by_the_library_choose_the_tokens_of_the_cpu() {
    let plain = spec(64, true);
    let gelu = ModelSpec { activation: Activation::GeluTanh, ..spec(32, false) };
    for (spec, element, bound) in
        [(&plain, Element::F32, 1e-4), (&gelu, Element::F32, 1e-4), (&plain, Element::Bf16, 2e-2)]
    {
        let library = ShimLibrary::of(&[Some(0.0)]);
        let computed = Arc::clone(&library.computed);
        let Some((mut cpu, mut cuda)) = engines(spec, element, library, LibraryUse::Always) else { return };
        let before = computed.load(Relaxed);
        let (same, worst) = serve(&mut cpu, &mut cuda);
        assert!(worst < bound, "{spec:?} in {element}: logits differ by {worst}");
        assert!(same == 4 || element != Element::F32, "{spec:?}: {same} of 4 tokens");
        // Four products of two layers, of the long prompt alone.
        assert_eq!(computed.load(Relaxed) - before, 8, "{spec:?}");
    }
}

#[test]
fn a_product_is_the_librarys_where_that_is_faster() {
    // A kernel costs 1 and gating as much: of algorithms that cost less, the least; one that is refused is none.
    for (cost, how, expect) in [
        (vec![Some(0.9), None, Some(0.5)], LibraryUse::Faster, Some(2)),
        (vec![Some(0.99)], LibraryUse::Faster, None),
        (vec![None], LibraryUse::Faster, None),
        (vec![Some(9.0), Some(7.0)], LibraryUse::Always, Some(1)),
        (vec![None], LibraryUse::Always, None),
    ] {
        let library = ShimLibrary::of(&cost);
        let (computed, last) = (Arc::clone(&library.computed), Arc::clone(&library.last));
        let Some((mut cpu, mut cuda)) = engines(&spec(32, true), Element::F32, library, how) else { return };
        let before = computed.load(Relaxed);
        serve(&mut cpu, &mut cuda);
        let n = computed.load(Relaxed) - before;
        assert_eq!(n > 0, expect.is_some(), "{cost:?} {how:?}: {n}");
        if let Some(algorithm) = expect {
            assert_eq!(last.load(Relaxed), algorithm, "{cost:?} {how:?}");
        }
        let refused =
            cuda.take_note().is_some_and(|note| note.contains("stays with the kernels: cuBLASLt: multiply failed"));
        assert_eq!(refused, cost == [None], "{cost:?}: no other is taken");
    }
}

#[test]
fn a_library_that_fails_is_left_alone() {
    let library = ShimLibrary::of(&[Some(0.0)]);
    let (computed, refuses) = (Arc::clone(&library.computed), Arc::clone(&library.refuses));
    let Some((mut cpu, mut cuda)) = engines(&spec(64, true), Element::F32, library, LibraryUse::Always) else { return };
    refuses.store(true, Relaxed);
    let sequence = Sequence { tokens: vec![7; 80], computed: 0, blocks: blocks([3, 2, 1, 4, 6]) };
    let mut step = Step::default();
    step.push(&sequence, 80, &Arc::default());
    let before = computed.load(Relaxed);
    let expect = tokens(&execute(&mut cpu, &step.plan, &mut NoEdits));
    assert_eq!(tokens(&execute(&mut cuda, &step.plan, &mut NoEdits)), expect, "the kernels computed it");
    let note = cuda.take_note().unwrap_or_default();
    assert_eq!(note, "cuBLASLt: multiply failed with 15 (as asked); from now on the kernels compute all of a prompt");
    refuses.store(false, Relaxed);
    assert_eq!(tokens(&execute(&mut cuda, &step.plan, &mut NoEdits)), expect);
    assert_eq!((computed.load(Relaxed), cuda.take_note()), (before, None));
}
