//! Tells who asks for NDJSON how the load of the model gets on for which the request waits.
//!
//! The body begins with the wait, before anybody knows whether it ends well: what goes wrong from then on is its last line. A
//! request that need not wait has its status and headers as ever, so this asks first, and begins nothing until it hears of a wait.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::Response;
use tokio::sync::watch;

use super::fields::Fields;
use super::generate::{Answer, Arrival, NDJSON, streaming};
use super::ndjson;
use super::progressive::Beginning;
use crate::admission::Permit;
use crate::demand::Loading;
use crate::error::ApiError;
use crate::stream::{EventBody, Tell, Telling};

/// A request that waits for its model, and what comes of it.
struct Waiting {
    /// Its id and when it was made, in Unix seconds.
    head: (Arc<str>, u64),
    loads: Loads,
    state: State,
}

enum State {
    Beginning(Beginning),
    Live(Box<Telling>),
}

/// What is heard of loads.
pub(super) struct Loads {
    next: Pin<Box<dyn Future<Output = Heard> + Send>>,
}

/// None where nobody has more to tell.
type Heard = Option<watch::Receiver<Option<Loading>>>;

/// Answers a request whose model may have to be loaded.
pub(super) async fn respond<F>(
    mut arrival: Arrival,
    permit: Permit,
    fields: Fields,
    begin: impl Fn(Arrival, Permit, Fields) -> F + Send + 'static,
) -> Result<Response, ApiError>
where
    F: Future<Output = Result<Answer, ApiError>> + Send + 'static,
{
    let head = (Arc::clone(&arrival.tag), arrival.state.clock.unix_seconds());
    let mut loads = Loads::of(&mut arrival);
    let mut beginning: Beginning = Box::pin(begin(arrival, permit, fields));
    let mut first = Vec::new();
    let answered = poll_fn(|cx| match beginning.as_mut().poll(cx) {
        Poll::Ready(answer) => Poll::Ready(Some(answer)),
        Poll::Pending if loads.tell(cx, &head, &mut first) => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    });
    if let Some(answer) = answered.await {
        return answer?.respond().await;
    }
    let mut response = streaming(NDJSON);
    let waiting = Waiting { head, loads, state: State::Beginning(beginning) };
    *response.body_mut() = Body::new(EventBody::new(waiting).beginning_with(first));
    Ok(response)
}

// === impl Loads ===

impl Loads {
    /// Has the request tell of loads.
    pub(super) fn of(arrival: &mut Arrival) -> Self {
        let (told, heard) = watch::channel(None);
        arrival.loading = Some(Arc::new(told));
        Self { next: Box::pin(next(heard)) }
    }

    /// Writes what there is to tell; whether there was something.
    pub(super) fn tell(&mut self, cx: &mut Context<'_>, (id, created): &(Arc<str>, u64), out: &mut Vec<u8>) -> bool {
        let mut has_told = false;
        while let Poll::Ready(heard) = self.next.as_mut().poll(cx) {
            let Some(mut heard) = heard else {
                self.next = Box::pin(std::future::pending());
                break;
            };
            if let Some(loading) = &*heard.borrow_and_update() {
                ndjson::loading(out, (id, *created), loading);
                has_told = true;
            }
            self.next = Box::pin(next(heard));
        }
        has_told
    }
}

async fn next(mut heard: watch::Receiver<Option<Loading>>) -> Heard {
    heard.changed().await.is_ok().then_some(heard)
}

impl Tell for Waiting {
    fn tell(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> bool {
        if let State::Beginning(beginning) = &mut self.state {
            let begun = beginning.as_mut().poll(cx);
            self.loads.tell(cx, &self.head, out);
            let Poll::Ready(begun) = begun else { return false };
            let begun = begun.and_then(|mut answer| {
                let lines = answer.running.lines().ok_or(ApiError::Internal)?;
                Ok(Telling::new(answer.running.feed, Box::new(lines)))
            });
            match begun {
                Ok(telling) => self.state = State::Live(Box::new(telling)),
                Err(error) => {
                    ndjson::broken(out, &error);
                    return true;
                }
            }
        }
        match &mut self.state {
            State::Live(telling) => telling.tell(cx, out),
            State::Beginning(_) => false,
        }
    }
}
