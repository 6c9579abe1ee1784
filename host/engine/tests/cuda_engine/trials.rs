//! Every way to compute a product, as `gpu-check` launches it: with the arguments that its kernel has, and to one result.

use pointsman_engine::Precision;
use pointsman_engine::cuda::cases::Rng;
use pointsman_engine::cuda::{Element, Form, Trial, ways};

use crate::device::ShimDevice;

/// Of k: nine tiles, for cuts into two to eight.
const LONG: usize = 576;

#[test]
fn every_way_to_compute_a_product_comes_to_the_same() {
    for (element, precision) in
        [(Element::Bf16, Precision::F16), (Element::F16, Precision::Q8_0), (Element::Bf16, Precision::Fp8)]
    {
        let Some(mut device) = ShimDevice::start() else { return };
        let form = Form { element, precision };
        // Four bytes that are a number in every form, whatever becomes of the bits of the mask; no room for other weights than the first.
        let word = [0x3c11_3b27, 0x8787_8787];
        let mut trial = Trial::new(&mut device, form, [33, LONG, 66], (0, word)).expect("room");
        let x = element.encode(&element.random(&mut Rng(5), 33 * LONG));
        let mut cut = 0;
        for rows in [2, 33] {
            let shape = [rows, LONG, 66];
            let ways = ways(form, 4, shape);
            assert_eq!(ways.iter().filter(|way| way.is_taken).count(), 1, "{ways:?}");
            let mut first: Option<Vec<f32>> = None;
            for way in ways {
                trial.ask(shape, &x).expect("room");
                trial.run(&way, shape, 2).unwrap_or_else(|error| panic!("{way:?}: {error}"));
                let found = trial.result(shape).expect("it is there");
                let expect = first.get_or_insert_with(|| found.clone());
                // In units of the largest, which is as large as the scales are.
                let largest = expect.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                let is_close = |(a, b): (&f32, &f32)| a.is_finite() && (a - b).abs() <= 1e-2 * largest;
                let is_right = largest > 0.0 && found.iter().zip(expect.iter()).all(is_close);
                assert!(is_right, "{way:?}: {:?}", &found[..4]);
                cut += usize::from(way.grid[2] > 1);
            }
        }
        assert!(cut > 0, "{form}: none was cut into runs");
    }
}
