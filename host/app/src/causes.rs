//! An error with what caused it, each cause once.
//!
//! Not anyhow's `{:#}`: errors of libraries often repeat their source in their own words, and it then stands there twice.

use std::error::Error;

/// The causes from the outermost on, without those that an earlier one has told.
pub(crate) fn told<'a>(causes: impl IntoIterator<Item = &'a (dyn Error + 'static)>) -> String {
    let mut said = String::new();
    for cause in causes {
        let words = cause.to_string();
        if said.contains(&words) {
            continue;
        }
        if !said.is_empty() {
            said.push_str(": ");
        }
        said.push_str(&words);
    }
    said
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        for (causes, expect) in [
            (&["a"][..], "a"),
            (&["no file", "x: no file"], "x: no file"),
            (&["no file", "x: no file", "keys"], "keys: x: no file"),
            (&["b", "a"], "a: b"),
        ] {
            let mut causes = causes.iter();
            let first = anyhow!(*causes.next().expect("one"));
            let error = causes.fold(first, |error, words| error.context(*words));
            assert_eq!(told(error.chain()), expect);
        }
    }
}
