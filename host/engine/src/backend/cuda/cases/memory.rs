//! Kernels that move memory, and the hand-over of sampled tokens.

use super::{Call, Case, Check, POISON, Rng, bytes_to_words, words_to_bytes};

fn exactly(expect: Vec<u8>) -> Check {
    Box::new(move |outs| if outs[0] == expect { Ok(()) } else { Err("other bytes than expected".to_owned()) })
}

fn words(rng: &mut Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.next() as u32).collect()
}

/// Every kernel here, at sizes that fit no tile.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut rng = Rng(11);
    let mut cases = Vec::new();

    let (from, sampled, tokens) = ([1, u32::MAX, 0, u32::MAX, 2], [70, 71, u32::MAX], [1, 2, 3, 4, 5, 6]);
    let call =
        Call::new("take_sampled", [2, 1, 1], 256).count(5).words(&from).words(&sampled).output(words_to_bytes(&tokens));
    cases.push(Case { what: "take_sampled".to_owned(), call, check: exactly(words_to_bytes(&[71, 2, 70, 4, 5, 6])) });

    let page = 16 * 37;
    let before: Vec<u8> = words_to_bytes(&words(&mut rng, 6 * page / 4));
    let mut after = before.clone();
    let pairs = [4, 1, 4, 0, 2, 5, 9, 9];
    for pair in pairs[..6].chunks(2) {
        after.copy_within(pair[0] as usize * page..(pair[0] as usize + 1) * page, pair[1] as usize * page);
    }
    let call = Call::new("copy_pages", [2, 4, 1], 256).count(3).words(&pairs).output(before).u64(page);
    cases.push(Case { what: "copy_pages".to_owned(), call, check: exactly(after) });

    let data = words(&mut rng, 4 * 4_099);
    let all = data.iter().fold(0, |all, word| all ^ word);
    let call = Call::new("read_stream", [3, 1, 1], 256).words(&data).u64(data.len() * 4).poisoned(12);
    let check: Check = Box::new(move |outs| {
        let found = bytes_to_words(&outs[0]).into_iter().fold(0, |all, word| all ^ word);
        if found == all { Ok(()) } else { Err("not every word was read once".to_owned()) }
    });
    cases.push(Case { what: "read_stream".to_owned(), call, check });

    for mask in [0, 0x807f_807f_u32] {
        let random = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
        let filled: Vec<u32> = (0..700).map(|i| 0xdead_beef ^ random(i) & mask).collect();
        let filled = [words_to_bytes(&filled), vec![POISON; 4]].concat();
        let call =
            Call::new("fill_words", [2, 1, 1], 256).poisoned(701 * 4).u64(700).u32(0xdead_beef).u32(mask as usize);
        cases.push(Case { what: format!("fill_words with {mask:#x} of them random"), call, check: exactly(filled) });
    }
    cases
}
