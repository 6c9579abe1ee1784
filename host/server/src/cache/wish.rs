//! What a client says of the cache in `cache-control`, in the words of RFC 9111 (5.2.1).

use axum::http::header::{CACHE_CONTROL, HeaderMap};
use pointsman_sched::ids::Micros;

/// Directives that are not named here ask for nothing that this cache does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wish {
    /// Compute it; what comes of it may be kept.
    pub(crate) no_cache: bool,
    /// Keep nothing of this request, and find nothing.
    pub(crate) no_store: bool,
    /// Oldest answer that will do.
    pub(crate) max_age: Option<Micros>,
}

impl Wish {
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let lines = headers.get_all(CACHE_CONTROL).into_iter().filter_map(|line| line.to_str().ok());
        let mut wish = Self::default();
        for directive in lines.flat_map(|line| line.split(',')) {
            let (name, value) = directive.split_once('=').unwrap_or((directive, ""));
            match name.trim().to_ascii_lowercase().as_str() {
                "no-cache" => wish.no_cache = true,
                "no-store" => wish.no_store = true,
                // An age that is no number is none at all: the stricter reading.
                "max-age" => {
                    let seconds: u64 = value.trim().trim_matches('"').parse().unwrap_or(0);
                    wish.max_age = Some(seconds.saturating_mul(1_000_000));
                }
                _ => {}
            }
        }
        wish
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn directives_are_read_in_any_case_and_on_any_line() {
        let wish = |no_cache, no_store, max_age| Wish { no_cache, no_store, max_age };
        for (lines, expect) in [
            (&[][..], Wish::default()),
            (&["no-cache"], wish(true, false, None)),
            (&["No-Store, max-age=60"], wish(false, true, Some(60_000_000))),
            (&["max-age=0", "no-cache"], wish(true, false, Some(0))),
            (&["max-age=soon"], wish(false, false, Some(0))),
            (&["only-if-cached, max-stale"], Wish::default()),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(CACHE_CONTROL, HeaderValue::from_static(line));
            }
            assert_eq!(Wish::of(&headers), expect, "{lines:?}");
        }
    }
}
