//! Forms over a tokenizer of bytes: what may be said, what is refused, and what a hostile form costs.

use std::sync::Arc;
use std::time::Duration;

use pointsman_sched::mask::{MaskError, TokenMask};
use pointsman_sched::sampler::Edit;
use pointsman_telemetry::{FormMetrics, Metrics};
use serde_json::{Value, json};

use super::{Form, GrammarDesk, GrammarError};
use crate::text::tests::{TOKENIZER_CONFIG, model, tokenizer_json};
use crate::text::{TextFiles, TextModel};

const EOS: u32 = 1;
const PATIENCE: Duration = Duration::from_secs(20);

/// A generator of which the test is a function.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % n
    }
}

/// Whether a text has a form.
type Check<'a> = &'a dyn Fn(&str) -> bool;

fn allowed(mask: &mut dyn TokenMask) -> Result<Vec<u32>, MaskError> {
    let edit = mask.mask(PATIENCE).expect("it comes")?;
    let Edit::Only(set) = &*edit else { panic!("{edit:?}") };
    Ok(set.tokens().collect())
}

/// Chooses at random among what may come, up to `limit` tokens; the text, and whether it has ended.
fn wander(mask: &mut dyn TokenMask, rng: &mut Rng, limit: usize) -> Result<(String, bool), MaskError> {
    let text = model();
    let mut said = Vec::new();
    mask.advance(None);
    for _ in 0..limit {
        let choices = allowed(mask)?;
        assert!(choices.iter().all(|&id| id == EOS || id > 2), "no special token but the last: {choices:?}");
        let token = choices[rng.below(choices.len())];
        if token == EOS {
            return Ok((text.decode(&said, true), true));
        }
        said.push(token);
        mask.advance(Some(token));
    }
    Ok((text.decode(&said, true), false))
}

#[tokio::test]
async fn whatever_is_chosen_has_the_form() {
    let desk = GrammarDesk::new(1 << 30);
    let text = Arc::new(model());
    let person = json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150}, "tags": {"type": "array", "maxItems": 3,
        "items": {"enum": ["a", "b\\u00e9"]}}}, "required": ["name", "age"], "additionalProperties": false});
    let is_person = |said: &str| {
        let value: Value = serde_json::from_str(said).unwrap_or_else(|error| panic!("{said}: {error}"));
        value["name"].as_str().is_some_and(|name| name.chars().count() <= 8)
            && value["age"].as_u64().is_some_and(|age| age <= 150)
            && value.as_object().is_some_and(|o| o.keys().all(|k| ["name", "age", "tags"].contains(&&**k)))
    };
    let is_phone = |said: &str| {
        said.len() == 8 && said.bytes().enumerate().all(|(i, b)| if i == 3 { b == b'-' } else { b.is_ascii_digit() })
    };
    let checks: [(Form, Check<'_>); 5] = [
        (Form::Json(person), &is_person),
        (Form::any_object(), &|said| serde_json::from_str::<Value>(said).is_ok_and(|value| value.is_object())),
        (Form::Regex("[0-9]{3}-[0-9]{4}".into()), &is_phone),
        (Form::Lark("start: \"(\" start \")\" | \"hello\"".into()), &|said| said.trim_matches(['(', ')']) == "hello"),
        (Form::one_of(&["yes".into(), "no \"way\"\n".into()]), &|said| ["yes", "no \"way\"\n"].contains(&said)),
    ];
    for (form, check) in checks {
        let compiled = desk.compile(&text, form.clone()).await.expect("a good form");
        let mut ended = 0;
        for seed in 0..20 {
            let (said, has_ended) = wander(&mut *compiled.mask(), &mut Rng(seed), 300).expect("it goes on");
            assert!(!has_ended || check(&said), "{form:?}: {said}");
            ended += u32::from(has_ended);
        }
        assert!(ended > 3, "{form:?}: {ended} of 20 have ended");
    }
}

#[tokio::test]
async fn forms_that_are_none_or_too_much_are_refused_with_what_to_change() {
    let desk = GrammarDesk::new(1 << 30);
    let text = Arc::new(model());
    let nested = |open: &str, n: usize, close: &str| format!("{}a{}", open.repeat(n), close.repeat(n));
    let rules = |n: usize| {
        let rule = |i: usize| format!("r{i}: \"a\" r{} | \"b\"\n", i + 1);
        format!("start: r0\n{}r{n}: \"c\"", (0..n).map(rule).collect::<String>())
    };
    for (form, expect) in [
        (Form::Regex("(".into()), "unclosed"),
        (Form::Regex("a".repeat(20_000)), "may have 16384"),
        (Form::Regex(nested("(", 200, ")")), "nests deeper than 128"),
        (Form::Lark("start:".repeat(3)), ""),
        (Form::Lark("start: other".into()), "other"),
        (Form::Json(json!({"type": "strin"})), "strin"),
        (Form::Json(json!({"type": "string", "pattern": "["})), ""),
        (Form::Json(json!({"$ref": "https://example.com/schema.json"})), ""),
        (Form::Json(json!(false)), ""),
        (Form::Json(json!({"enum": [(0..9_000).collect::<Vec<_>>(), "x".repeat(60_000)]})), "may have 65536"),
    ] {
        match desk.compile(&text, form.clone()).await.map(|_| ()) {
            Err(error @ (GrammarError::Refused(_) | GrammarError::TooLarge { .. } | GrammarError::TooDeep { .. })) => {
                assert!(error.to_string().contains(expect), "{form:?}: {error}");
                assert!(error.to_string().len() < 400 && !error.to_string().contains('\n'), "{error}");
            }
            other => panic!("{form:?}: {other:?}"),
        }
    }
    // Whatever these come to, they come to it soon, and the next form is served.
    for form in [
        Form::Regex("(a{1,1000}){1,1000}".into()),
        Form::Regex("(a|aa|aaa)*".repeat(300)),
        Form::Lark(rules(600)),
        Form::Lark(format!("start: {}", "\"a\"? ".repeat(2_000))),
        Form::Json(
            json!({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000, "maxItems": 9_000_000}),
        ),
        Form::Json(json!({"type": "string", "minLength": 1_000_000, "maxLength": 100_000_000})),
        Form::Json(
            json!({"allOf": (0..12).map(|i| json!({"anyOf": (0..6).map(|j| json!({"required": [format!("{i}{j}")],
            "properties": {format!("{i}{j}"): {"type": "integer"}}})).collect::<Vec<_>>()})).collect::<Vec<_>>()}),
        ),
        Form::Json(
            json!({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}),
        ),
    ] {
        let outcome = match desk.compile(&text, form.clone()).await {
            Ok(compiled) => {
                wander(&mut *compiled.mask(), &mut Rng(3), 20).map(|_| ()).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        assert!(!matches!(&outcome, Err(why) if why.contains('\n') || why.len() > 500), "{outcome:?}");
        desk.compile(&text, Form::Regex("a".into())).await.expect("the next one is served");
    }
}

#[tokio::test]
async fn a_mask_that_has_failed_stays_failed() {
    let desk = GrammarDesk::new(1 << 30);
    let compiled = desk.compile(&Arc::new(model()), Form::Regex("ab".into())).await.expect("good");
    let mut mask = compiled.mask();
    mask.advance(None);
    assert_eq!(allowed(&mut *mask).expect("`a`"), [u32::from(b'a') + 3]);
    assert_eq!(allowed(&mut *mask).expect("the same again").len(), 1);
    mask.advance(Some(u32::from(b'x') + 3));
    let error = allowed(&mut *mask).expect_err("it was not allowed");
    assert!(error.to_string().contains("too complex here ("), "{error}");
    mask.advance(Some(u32::from(b'b') + 3));
    assert_eq!(allowed(&mut *mask), Err(error));
}

#[tokio::test]
async fn a_token_that_the_trie_cannot_hold_is_never_used() {
    let desk = GrammarDesk::new(1 << 30);
    let mut tokenizer: Value = serde_json::from_slice(&tokenizer_json()).expect("good");
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().expect("a map");
    let lengths = [1_022, 1_023, 1_024, 5_000];
    let first = u32::try_from(vocabulary.len()).expect("few");
    for (id, n) in (first..).zip(lengths) {
        vocabulary.insert("x".repeat(n), id.into());
    }
    let tokenizer = tokenizer.to_string();
    let files = TextFiles {
        tokenizer: tokenizer.as_bytes(),
        tokenizer_config: Some(TOKENIZER_CONFIG.as_bytes()),
        ..TextFiles::default()
    };
    let text = Arc::new(TextModel::from_files(&files).expect("good"));
    let compiled = desk.compile(&text, Form::Regex("x*".into())).await.expect("long tokens are no fault of the form");
    let mut mask = compiled.mask();
    mask.advance(None);
    let found: Vec<u32> = allowed(&mut *mask).expect("some").into_iter().filter(|id| *id >= first).collect();
    assert_eq!(found, [first, first + 1], "those of up to 1023 bytes");
}

#[tokio::test]
async fn forms_and_masks_have_one_bound_of_memory() {
    let text = Arc::new(model());
    let form =
        || Form::Json(json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-f]{3,9}$"}}}));
    // What one form uses, found by halving.
    let mut most = 1_usize << 24;
    while GrammarDesk::new(most / 2).compile(&text, form()).await.is_ok() {
        most /= 2;
    }
    assert!(most > 256, "a form is not for nothing");
    let desk = GrammarDesk::new(most);
    let compiled = desk.compile(&text, form()).await.expect("the first has room");
    assert!(matches!(desk.compile(&text, form()).await, Err(GrammarError::NoMemory)), "the second has none");
    // Its mask is a copy, which has none either.
    let mut mask = compiled.mask();
    mask.advance(None);
    assert_eq!(allowed(&mut *mask), Err(MaskError::NoMemory));
    mask.advance(Some(EOS));
    assert_eq!(allowed(&mut *mask), Err(MaskError::NoMemory), "it stays so");
    drop((compiled, mask));
    desk.compile(&text, form()).await.expect("what has ended makes room");
}

/// A desk that keeps forms, with the counters of hits, joins and misses, and what is kept.
fn keeping(most: usize, most_bytes: usize) -> (GrammarDesk, impl Fn() -> [u64; 4]) {
    let metrics = Metrics::new().forms();
    let desk = GrammarDesk::new(1 << 30).keeping(most, most_bytes, metrics.clone());
    let FormMetrics { hits, joined, misses, kept, .. } = metrics;
    (desk, move || [hits.get(), joined.get(), misses.get(), u64::try_from(kept.get()).expect("a number")])
}

#[tokio::test]
async fn a_form_is_compiled_once_for_all_who_ask() {
    let texts = [(); 2].map(|()| Arc::new(model()));
    let regex = |pattern: &str| Form::Regex(pattern.into());
    let schema = |key: &str| Form::Json(json!({"type": "object", "required": [key]}));
    // Per step a form and a tokenizer, then hits, joins, misses and kept forms.
    let steps = [
        (regex("a"), 0, [0, 0, 1, 1]),
        (regex("a"), 0, [1, 0, 1, 1]),
        (Form::Lark("start: \"a\"".into()), 0, [1, 0, 2, 2]),
        (schema("a"), 0, [1, 0, 3, 3]),
        (schema("a"), 1, [1, 0, 4, 3]),
        (schema("a"), 0, [2, 0, 4, 3]),
        // The one used longest ago has gone, and what is wrong stays wrong.
        (regex("a"), 0, [2, 0, 5, 3]),
        (regex("("), 0, [2, 0, 6, 3]),
        (regex("("), 0, [3, 0, 6, 3]),
    ];
    let (desk, counted) = keeping(3, 1 << 30);
    for (i, (form, text, expect)) in steps.into_iter().enumerate() {
        let outcome = desk.compile(&texts[text], form.clone()).await;
        assert_eq!((outcome.is_ok(), counted()), (form != regex("("), expect), "step {i}");
    }
    let a = desk.compile(&texts[0], schema("b")).await.expect("a good form");
    // What is shared is copied for each text.
    for seed in 0..3 {
        let (said, _) = wander(&mut *a.mask(), &mut Rng(seed), 20).expect("it goes on");
        assert!(said.starts_with('{'), "{said}");
    }
}

#[tokio::test]
async fn whoever_leaves_leaves_the_work_to_the_next() {
    let (desk, counted) = keeping(3, 1 << 30);
    let (text, form) = (Arc::new(model()), Form::Regex("abc".into()));
    // Somebody has begun, and is never done.
    let place = desk.kept.as_ref().expect("forms are kept").find(&text, form.key());
    let mut first = Box::pin(place.get_or_init(std::future::pending));
    assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(first.as_mut().poll(cx).is_pending())).await);
    let compile = || desk.compile(&text, form.clone());
    // All three wait by the time that the first one leaves.
    let (a, b, c, ()) = tokio::join!(compile(), compile(), compile(), async { drop(first) });
    let [a, b, c] = [a, b, c].map(|outcome| outcome.expect("it is compiled all the same"));
    assert!(Arc::ptr_eq(&a, &b) && Arc::ptr_eq(&b, &c));
    assert_eq!(counted(), [0, 3, 1, 1]);
}

#[tokio::test]
async fn what_is_kept_has_bounds_and_gives_way() {
    let text = Arc::new(model());
    let form = |key: &str| {
        Form::Json(json!({"type": "object", "properties": {key: {"type": "string", "pattern": "^[a-f]{3,9}$"}}}))
    };
    // They are nearly of one size.
    let mut sizes = Vec::new();
    for key in ["a", "b", "c"] {
        sizes.push(GrammarDesk::new(1 << 30).compile(&text, form(key)).await.expect("good").bytes());
    }
    let (least, bytes) = sizes.iter().fold((usize::MAX, 0), |(least, most), &n| (least.min(n), most.max(n)));
    for (most, most_bytes, kept) in
        [(0, 1 << 30, 0), (9, 0, 0), (9, least - 1, 0), (9, 2 * bytes, 2), (1, 9 * bytes, 1)]
    {
        let (desk, counted) = keeping(most, most_bytes);
        for key in ["a", "b", "c"] {
            desk.compile(&text, form(key)).await.expect("good");
        }
        assert_eq!(counted()[3], kept, "{most} of {most_bytes} bytes");
    }
    // Live texts come before what is only kept.
    let metrics = Metrics::new().forms();
    let desk = GrammarDesk::new(bytes).keeping(9, bytes, metrics.clone());
    for key in ["a", "b", "a"] {
        desk.compile(&text, form(key)).await.expect("the one before makes room");
    }
    let held = desk.compile(&text, form("a")).await.expect("good");
    assert!(matches!(desk.compile(&text, form("c")).await, Err(GrammarError::NoMemory)), "it is in use");
    drop(held);
    desk.compile(&text, form("c")).await.expect("what passes with time is not kept");
    // What was compiled for a model that has gone goes at the next look.
    let (desk, counted) = keeping(9, 1 << 30);
    desk.compile(&Arc::new(model()), form("a")).await.expect("good");
    desk.compile(&text, form("a")).await.expect("good");
    assert_eq!(counted(), [0, 0, 2, 1]);
}
