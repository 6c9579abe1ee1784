//! From a form to the state machine of its grammar, within bounds.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{JsonCompileOptions, TokenParser};
use pointsman_sched::mask::TokenMask;
use serde_json::Value;
use tokio::sync::oneshot;

use super::ledger::Share;
use super::mask::{Errand, GrammarMask, bytes_of};
use super::{Form, GrammarError, Key, KeyWriter};
use crate::text::TextModel;

/// Size of a schema, written out.
const MAX_SCHEMA: usize = 64 << 10;
/// Size of a regular expression or grammar, of which the work may be the square.
const MAX_GRAMMAR: usize = 16 << 10;
/// Brackets of all kinds around one place of a grammar; JSON has the bound of its parser.
const MAX_DEPTH: usize = 128;
/// Of an error's text.
const MAX_WHY: usize = 300;
/// White space between two parts of JSON: a space, or a line break with its indentation, and no room for a model that has lost
/// itself in it.
const WHITESPACE: &str = r"\x20|\x0D?\x0A[\x20\x09]{0,24}";

/// What the work for one form, and for each of its masks, may come to.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2_000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    // One to two KB each.
    max_lexer_states: 20_000,
    max_grammar_size: 200_000,
    precompute_large_lexemes: true,
    verbose_errors: false,
};

/// A grammar that is ready to guide texts of one tokenizer.
pub(crate) struct Compiled {
    parser: TokenParser,
    errands: SyncSender<Errand>,
    share: Share,
}

/// A form on its way to the thread that compiles.
#[derive(Debug)]
pub(super) struct Order {
    text: Arc<TextModel>,
    form: Form,
    errands: SyncSender<Errand>,
    share: Share,
    answer: oneshot::Sender<Result<Compiled, GrammarError>>,
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

impl Compiled {
    /// What one more text is masked by.
    pub(crate) fn mask(&self) -> Box<dyn TokenMask> {
        Box::new(GrammarMask::new(self.parser.deep_clone(), self.errands.clone(), self.share.another()))
    }

    /// What it uses, as far as that is counted.
    pub(super) fn bytes(&self) -> usize {
        self.share.bytes()
    }
}

// === impl Form ===

impl Form {
    /// Any JSON object.
    pub(crate) fn any_object() -> Self {
        Self::Json(serde_json::json!({"type": "object"}))
    }

    /// One of these texts.
    pub(crate) fn one_of(choices: &[String]) -> Self {
        let quoted: Vec<String> = choices.iter().map(|choice| Value::from(choice.as_str()).to_string()).collect();
        Self::Lark(format!("start: {}", quoted.join(" | ")))
    }

    /// What stands for it. The order of a schema's members is part of it: texts have them in that order.
    pub(crate) fn key(&self) -> Key {
        let mut key = KeyWriter::default();
        let (kind, text) = match self {
            Self::Json(schema) => (0, schema.to_string()),
            Self::Regex(pattern) => (1, pattern.clone()),
            Self::Lark(grammar) => (2, grammar.clone()),
        };
        key.number(kind);
        key.text(&text);
        key.key()
    }

    /// Refuses what is too large to be looked at.
    pub(super) fn check(&self) -> Result<(), GrammarError> {
        let (found, limit, depth) = match self {
            Self::Json(schema) => (schema.to_string().len(), MAX_SCHEMA, 0),
            Self::Regex(text) | Self::Lark(text) => (text.len(), MAX_GRAMMAR, depth(text)),
        };
        match (found > limit, depth > MAX_DEPTH) {
            (true, _) => Err(GrammarError::TooLarge { found, limit }),
            (_, true) => Err(GrammarError::TooDeep { limit: MAX_DEPTH }),
            _ => Ok(()),
        }
    }

    fn grammar(self) -> TopLevelGrammar {
        match self {
            Self::Json(Value::Object(schema)) => {
                let options =
                    JsonCompileOptions { whitespace_pattern: Some(WHITESPACE.to_owned()), ..Default::default() };
                let mut schema = Value::Object(schema);
                options.apply_to(&mut schema);
                TopLevelGrammar::from_json_schema(schema)
            }
            // `true` and `false` are schemas too.
            Self::Json(schema) => TopLevelGrammar::from_json_schema(schema),
            Self::Regex(pattern) => TopLevelGrammar::from_regex(&pattern),
            Self::Lark(grammar) => TopLevelGrammar::from_lark(grammar),
        }
    }
}

/// Brackets that are open at once, whatever they mean: an upper bound of what the engine descends into.
fn depth(text: &str) -> usize {
    let mut depth = 0_usize;
    let after = text.bytes().map(|byte| {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth
    });
    after.max().unwrap_or(0)
}

// === impl Order ===

impl Order {
    pub(super) fn of(
        text: Arc<TextModel>,
        form: Form,
        (errands, share): (SyncSender<Errand>, Share),
    ) -> (Self, oneshot::Receiver<Result<Compiled, GrammarError>>) {
        let (answer, answered) = oneshot::channel();
        (Self { text, form, errands, share, answer }, answered)
    }

    /// Compiles; for nobody who has stopped waiting.
    pub(super) fn carry_out(self) {
        let Self { text, form, errands, mut share, answer } = self;
        if answer.is_closed() {
            return;
        }
        let compiled = parser(&text, form).and_then(|parser| match share.set(bytes_of(&parser)) {
            true => Ok(Compiled { parser, errands, share }),
            false => Err(GrammarError::NoMemory),
        });
        // Whoever is answered may be the last who holds the model.
        drop(text);
        // Whoever asked may have gone in the meantime.
        let _ = answer.send(compiled);
    }
}

fn parser(text: &TextModel, form: Form) -> Result<TokenParser, GrammarError> {
    let factory = text.grammar_factory().ok_or(GrammarError::NoEnd)?;
    let (init, logger) = (form.grammar(), llguidance::Logger::new(0, 0));
    let init = llguidance::api::GrammarInit::Serialized(init);
    let parser = factory.create_parser_from_init_ext(
        init,
        logger,
        llguidance::toktrie::InferenceCapabilities::default(),
        LIMITS,
    );
    let mut parser = parser.map_err(|why| GrammarError::Refused(brief(&why.to_string())))?;
    parser.start_without_prompt();
    Ok(parser)
}

/// An error's text in one line; of a long one, which repeats what the client sent, the beginning and the end.
pub(super) fn brief(why: &str) -> String {
    let line = why.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.len() <= MAX_WHY {
        return line;
    }
    let (head, tail) = (line.floor_char_boundary(MAX_WHY / 2), line.ceil_char_boundary(line.len() - MAX_WHY / 2));
    format!("{} ... {}", &line[..head], &line[tail..])
}
