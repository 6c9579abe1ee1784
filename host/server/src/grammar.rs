//! Text that must have a form: JSON, a schema, a regular expression, a grammar.
//!
//! llguidance turns a form and a tokenizer into the set of tokens that may come next; this module decides where that happens
//! and how much of it a client may ask for. A form is compiled on threads of their own, because it is the client's and may
//! take long, and never on a worker that serves others. Masks are computed on a few more, while the device computes the step
//! in which they are needed (`pointsman_sched::mask`). All these threads have deep stacks: the engine descends into what a
//! client has nested. Not a process as for policies: sizes, depth and fuel bound the work, and nothing is executed.

mod compile;
mod kept;
mod ledger;
mod mask;
#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use pointsman_telemetry::FormMetrics;
use serde_json::Value;

use self::compile::Order;
use self::kept::{Kept, Outcome};
use self::ledger::Ledger;
use self::mask::Errand;
use crate::cache::{Key, KeyWriter};
use crate::text::TextModel;

pub(crate) use self::compile::Compiled;

/// Forms that wait to be compiled; the next ones get 429.
const MAX_ORDERS: usize = 32;
/// Time for a form to be compiled, the wait for its turn included. The first of a model waits for its trie of tokens as well.
const COMPILE_LIMIT_MS: u64 = 10_000;
/// Masks that wait to be computed: each request in flight has one at most.
const MAX_ERRANDS: usize = 1 << 16;
/// Threads that compile.
const COMPILE_THREADS: usize = 2;
/// Threads that compute masks, at most.
const MAX_MASK_THREADS: usize = 4;
/// Address space, of which only what is used becomes memory.
const STACK_BYTES: usize = 256 << 20;

/// What a text must be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Form {
    /// An instance of this schema.
    Json(Value),
    /// A match of the whole text.
    Regex(String),
    /// A word of this grammar, in Lark's syntax.
    Lark(String),
}

/// Why a form cannot be asked for. The client's to change, but for the last two, which pass with time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GrammarError {
    #[error("it has {found} bytes and may have {limit}: shorten it")]
    TooLarge { found: usize, limit: usize },
    #[error("it nests deeper than {limit} levels: flatten it, or name parts of it and refer to them")]
    TooDeep { limit: usize },
    #[error("{0}")]
    Refused(String),
    #[error("it took more than {COMPILE_LIMIT_MS} ms to compile: simplify it")]
    Slow,
    #[error("this model has no token that ends a text, so that no form can be asked of it")]
    NoEnd,
    #[error("too many formats are being compiled")]
    Busy,
    #[error("the formats of all requests in flight use the memory that this host gives them")]
    NoMemory,
}

/// Compiles forms, on threads that start with the first one and end when this is dropped.
#[derive(Debug)]
pub(crate) struct GrammarDesk {
    threads: OnceLock<Option<Threads>>,
    ledger: Arc<Ledger>,
    /// Where compiled forms are kept.
    kept: Option<Kept>,
}

#[derive(Debug)]
struct Threads {
    orders: SyncSender<Order>,
    errands: SyncSender<Errand>,
}

impl GrammarDesk {
    /// A desk whose forms, with the masks made of them, use at most `most_bytes` at once.
    pub(crate) fn new(most_bytes: usize) -> Self {
        Self { threads: OnceLock::new(), ledger: Ledger::new(most_bytes), kept: None }
    }

    /// Keeps so many compiled forms, of so many bytes, within the same bound; 0 of either keeps none.
    pub(crate) fn keeping(self, most: usize, most_bytes: usize, metrics: FormMetrics) -> Self {
        let kept = (most > 0 && most_bytes > 0).then(|| Kept::new(most, most_bytes, metrics));
        Self { kept, ..self }
    }

    /// Compiles a form for a model's tokenizer, or finds it compiled.
    ///
    /// # Errors
    /// Says what is wrong with the form, or that there is no time for it.
    pub(crate) async fn compile(&self, text: &Arc<TextModel>, form: Form) -> Outcome {
        form.check()?;
        let Some(kept) = &self.kept else { return self.order(text, form).await };
        let key = form.key();
        let place = kept.find(text, key);
        let work = async {
            let mut outcome = self.order(text, form.clone()).await;
            // What is kept gives way to what is wanted.
            if matches!(outcome, Err(GrammarError::NoMemory)) && kept.clear() {
                outcome = self.order(text, form).await;
            }
            let bytes = outcome.as_ref().map_or(0, |compiled| compiled.bytes());
            kept.settle(text, key, (&outcome, bytes));
            outcome
        };
        place.get_or_init(|| work).await.clone()
    }

    /// Has a form compiled.
    async fn order(&self, text: &Arc<TextModel>, form: Form) -> Outcome {
        let threads = self.threads.get_or_init(|| {
            Threads::start().inspect_err(|error| tracing::error!(%error, "grammars have no thread")).ok()
        });
        let threads = threads.as_ref().ok_or(GrammarError::Busy)?;
        let (order, answer) = Order::of(Arc::clone(text), form, (threads.errands.clone(), Ledger::share(&self.ledger)));
        threads.orders.try_send(order).map_err(|_| GrammarError::Busy)?;
        match tokio::time::timeout(Duration::from_millis(COMPILE_LIMIT_MS), answer).await {
            Ok(Ok(compiled)) => compiled.map(Arc::new),
            Ok(Err(_)) => Err(GrammarError::Refused("it could not be compiled".to_owned())),
            Err(_) => Err(GrammarError::Slow),
        }
    }
}

impl Threads {
    /// Two that compile, so that one slow form does not hold up all; and for masks half as many as there are processors: the others compute what the masks are for.
    fn start() -> std::io::Result<Self> {
        let (orders, inbox) = sync_channel(MAX_ORDERS);
        let inbox = Arc::new(Mutex::new(inbox));
        for i in 0..COMPILE_THREADS {
            spawn(&format!("grammar-compile-{i}"), Arc::clone(&inbox), Order::carry_out)?;
        }
        let (errands, inbox) = sync_channel(MAX_ERRANDS);
        let inbox = Arc::new(Mutex::new(inbox));
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        for i in 0..(processors / 2).clamp(1, MAX_MASK_THREADS) {
            spawn(&format!("grammar-mask-{i}"), Arc::clone(&inbox), Errand::run)?;
        }
        Ok(Self { orders, errands })
    }
}

/// A thread that works off `inbox` until every sender is gone.
fn spawn<T: Send + 'static>(name: &str, inbox: Arc<Mutex<Receiver<T>>>, work: fn(T)) -> std::io::Result<()> {
    let next = move || inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
    let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    thread.spawn(move || {
        while let Ok(job) = next() {
            // A job that panics loses its own answer, and whoever waits for it is told so; the thread goes on.
            if catch_unwind(AssertUnwindSafe(|| work(job))).is_err() {
                tracing::error!("a job of the grammar engine ended in a panic");
            }
        }
    })?;
    Ok(())
}
