//! Which pages of the web may read answers: none, unless their origins are listed.

use std::time::Duration;

use axum::http::{HeaderValue, Method, Uri};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer, ExposeHeaders};

/// Time for which a browser need not ask again.
const MAX_AGE: Duration = Duration::from_secs(3_600);

/// Lets pages of these origins ask and read; none where there are none. Browsers send no cookies along: who may ask is said by API
/// keys, which a page sends itself.
pub(crate) fn layer(origins: &[String]) -> Option<CorsLayer> {
    let listed: Vec<HeaderValue> = origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()).collect();
    let allowed = match origins {
        [] => return None,
        [any] if any == "*" => AllowOrigin::any(),
        _ => AllowOrigin::list(listed),
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(ExposeHeaders::any())
        .max_age(MAX_AGE);
    Some(layer)
}

/// The first origin that is none as browsers write it, where `*` is the only one or there is none of it.
pub(crate) fn wrong(origins: &[String]) -> Option<&str> {
    let is_alone = origins.len() == 1;
    origins.iter().map(String::as_str).find(|&origin| !is_origin(origin) && (origin != "*" || !is_alone))
}

fn is_origin(text: &str) -> bool {
    let Ok(uri) = text.parse::<Uri>() else { return false };
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return false };
    text == format!("{scheme}://{authority}")
        && !authority.as_str().contains(['@', '*'])
        && text == text.to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_written_as_browsers_write_them() {
        for (origins, expect) in [
            (&["https://chat.example", "http://localhost:3000", "app://ui"][..], None),
            (&["*"], None),
            (&[], None),
            (&["*", "https://a.example"], Some("*")),
            (&["https://a.example/"], Some("https://a.example/")),
            (&["https://a.example/ui"], Some("https://a.example/ui")),
            (&["a.example"], Some("a.example")),
            (&["https://u@a.example"], Some("https://u@a.example")),
            (&["https://A.example"], Some("https://A.example")),
            (&["https://*.example"], Some("https://*.example")),
            (&[""], Some("")),
        ] {
            let origins: Vec<String> = origins.iter().map(|&origin| origin.to_owned()).collect();
            assert_eq!(wrong(&origins), expect, "{origins:?}");
        }
    }
}
