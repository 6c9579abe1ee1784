//! Requests that must keep a form: every token is one that their mask allows, however late it comes, and nobody else notices.

use std::sync::Arc;
use std::time::Duration;

use crate::batch::NativeBatch;
use crate::ids::RequestId;
use crate::mask::{MaskError, TokenMask, TokenSet};
use crate::request::{CancelCause, Failure, SinkEvent};
use crate::sampler::Edit;

use super::model::{Host, VOCABULARY, reference};
use super::{CONFIG, request};

/// Allows one token after the other, each after having been asked in vain `late` times; fails when it has no more.
#[derive(Debug)]
struct Script {
    tokens: Vec<u32>,
    late: u32,
    /// Tokens that it was told of.
    told: usize,
    asked: u32,
}

impl TokenMask for Script {
    fn advance(&mut self, token: Option<u32>) {
        match token {
            None => assert_eq!((self.told, self.asked), (0, 0), "it starts once"),
            Some(token) => {
                assert_eq!(self.tokens[self.told], token, "it is told what it allowed");
                assert!(self.asked > self.late, "no token was chosen without it");
                self.told += 1;
            }
        }
        self.asked = 0;
    }

    fn mask(&mut self, patience: Duration) -> Option<Result<Arc<Edit>, MaskError>> {
        assert!(patience <= Duration::from_micros(125));
        self.asked += 1;
        if self.asked <= self.late {
            return None;
        }
        let Some(&token) = self.tokens.get(self.told) else {
            return Some(Err(MaskError::Grammar { why: "no more".into() }));
        };
        let mut words = vec![0; VOCABULARY.div_ceil(32) as usize];
        words[token as usize / 32] = 1 << (token % 32);
        Some(Ok(Arc::new(Edit::Only(TokenSet::from_words(words)))))
    }
}

fn script(id: u64, n: u32, late: u32) -> Script {
    let first = u32::try_from(id).expect("small") * 50;
    Script { tokens: (first..first + n).collect(), late, told: 0, asked: 0 }
}

#[test]
fn a_mask_decides_every_token_however_late_it_is() {
    for late in [0, 1, 30] {
        let mut host = Host::new(CONFIG);
        for id in [1, 2, 3, 4] {
            host.submit(request(id, 5, 6));
            if id % 2 == 0 {
                host.desk.constrain(RequestId(id), Box::new(script(id, 6, late)));
            }
            host.step(&mut NativeBatch);
        }
        host.run_until_idle(&mut NativeBatch);
        for id in [2, 4] {
            assert_eq!(host.tokens(id), script(id, 6, 0).tokens, "late: {late}");
        }
        for id in [1, 3] {
            assert_eq!(host.tokens(id), reference(&request(id, 5, 6)), "a neighbour");
        }
    }
}

#[test]
fn a_late_mask_costs_its_own_request_only() {
    let mut host = Host::new(CONFIG);
    for id in [1, 2] {
        host.submit(request(id, 4, 4));
    }
    host.desk.constrain(RequestId(2), Box::new(script(2, 4, 90)));
    for _ in 0..4 {
        host.step(&mut NativeBatch);
    }
    assert_eq!((host.tokens(1).len(), host.tokens(2).len()), (4, 0));
}

#[test]
fn while_every_mask_is_late_nothing_is_computed() {
    let mut host = Host::new(CONFIG);
    let submit = |host: &mut Host, id, late| {
        host.submit(request(id, 4, 2));
        host.desk.constrain(RequestId(id), Box::new(script(id, 2, late)));
    };
    let stalls = |host: &mut Host| host.desk.is_stalled(host.now, &host.scheduler);
    // A step asks nine times, a look once.
    submit(&mut host, 1, 60);
    assert!(!stalls(&mut host), "it has not been tried");
    host.step(&mut NativeBatch);
    assert!(stalls(&mut host));
    // It sleeps for so long at most, and then comes by deadlines.
    host.now += 99_999;
    assert!(stalls(&mut host));
    host.now += 1;
    assert!(!stalls(&mut host));
    host.step(&mut NativeBatch);
    assert!(stalls(&mut host));
    // Somebody comes, who has no mask; then somebody whose mask is late too.
    host.submit(request(2, 4, 2));
    assert!(!stalls(&mut host));
    host.step(&mut NativeBatch);
    assert!(!stalls(&mut host), "who has no mask goes on");
    host.step(&mut NativeBatch);
    assert_eq!((host.tokens(1).len(), host.tokens(2).len()), (0, 2));
    submit(&mut host, 3, u32::MAX);
    host.step(&mut NativeBatch);
    while stalls(&mut host) {}
    host.step(&mut NativeBatch);
    assert_eq!((host.tokens(1).len(), host.tokens(3).len()), (1, 0), "the first one's is there");
    host.cancel(3, CancelCause::Asked);
    assert!(!stalls(&mut host));
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(1), script(1, 2, 0).tokens);
    assert!(!stalls(&mut host) && host.desk.is_settled());
}

#[test]
fn a_mask_that_fails_ends_its_request() {
    let mut host = Host::new(CONFIG);
    for id in [1, 2] {
        host.submit(request(id, 4, 4));
    }
    host.desk.constrain(RequestId(2), Box::new(script(2, 2, 0)));
    host.run_until_idle(&mut NativeBatch);
    assert_eq!(host.tokens(1), reference(&request(1, 4, 4)));
    assert_eq!(host.tokens(2), [100, 101]);
    let why = MaskError::Grammar { why: "no more".into() };
    assert_eq!(host.sent(2).events.last(), Some(&SinkEvent::Failed(Failure::Mask(why))));
}
