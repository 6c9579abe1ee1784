//! Handshakes that never come, and pairs that do not fit.

use std::sync::Arc;

use crate::fakes::Rig;
use crate::{Listeners, Plane, ServerConfig, Tls, TlsError, Validity, serve, validity};

/// A certificate and its key, and another pair.
const OURS: &[u8] = include_bytes!("../../../../tests/e2e/registry.pem");
const OTHERS: &[u8] = include_bytes!("../../../../tests/e2e/renewed.pem");
/// Two that are not valid now.
const EXPIRED: &[u8] = include_bytes!("../../../../tests/e2e/expired.pem");
const UNBORN: &[u8] = include_bytes!("../../../../tests/e2e/unborn.pem");

fn key_of(pair: &[u8]) -> &[u8] {
    let text = std::str::from_utf8(pair).expect("PEM");
    &pair[text.find("-----BEGIN PRIVATE KEY").or_else(|| text.find("-----BEGIN EC")).expect("a key")..]
}

#[test]
fn a_pair_that_cannot_be_used_is_named() {
    let is = |result: Result<Tls, TlsError>, expect: &str| match result {
        Ok(_) => expect.is_empty(),
        Err(error) => !expect.is_empty() && error.to_string().contains(expect),
    };
    for (chain, key, expect) in [
        (OURS, OURS, ""),
        (OURS, OTHERS, "cannot be used together"),
        (key_of(OURS), OURS, "no `BEGIN CERTIFICATE`"),
        (OURS, &b""[..], "no private key"),
        (&b"-----BEGIN CERTIFICATE-----\n!"[..], OURS, "not PEM"),
    ] {
        assert!(is(Tls::new(chain, key), expect), "{expect}");
    }
}

#[test]
fn a_certificate_says_when_it_is_valid() {
    // The beginnings of 2020, 2100, 2120 and 2021.
    let (then, later, until_s, soon) = (1_577_836_800, 4_102_444_800, 4_733_510_400, 1_609_459_200);
    for (pem, expect) in [
        (EXPIRED.to_vec(), Some(Validity { from_s: then, until_s: soon })),
        (UNBORN.to_vec(), Some(Validity { from_s: later, until_s })),
        // One that hangs together with others is valid with all of them.
        ([OURS, UNBORN].concat(), Some(Validity { from_s: later, until_s })),
        ([OTHERS, UNBORN, EXPIRED].concat(), Some(Validity { from_s: later, until_s: soon })),
        (key_of(OURS).to_vec(), None),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_vec(), None),
    ] {
        assert_eq!(validity(&pem), expect);
    }
}

#[tokio::test]
async fn who_shakes_no_hands_is_cut_off() {
    let rig = Rig::with(ServerConfig { header_timeout_ms: 50, ..ServerConfig::default() });
    let bind = async || tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let tls = Some(Arc::new(Tls::new(OURS, OURS).expect("a pair")));
    let listeners = Listeners { data: Plane { socket: bind().await, tls }, admin: bind().await.into() };
    let at = listeners.data.socket.local_addr().expect("bound");
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let client = async {
        // Nothing at all, and the beginning of a hello.
        for hello in [&b""[..], &[0x16, 3, 1]] {
            let client = tokio::net::TcpStream::connect(at).await.expect("it listens");
            client.writable().await.expect("a connection");
            assert_eq!(client.try_write(hello).expect("room"), hello.len());
            client.readable().await.expect("its end");
            // The end, or a reset where something was unread.
            assert!(!client.try_read(&mut [0; 1]).is_ok_and(|n| n > 0), "nothing is said");
        }
        assert!(rig.state.metrics.render().contains("pointsman_tls_failures_total{reason=\"slow\"} 2"));
        stop.send(()).expect("it serves");
    };
    let serving = serve(listeners, Arc::clone(&rig.state), async { drop(stopped.await) });
    let (served, ()) = tokio::join!(serving, client);
    served.expect("it stops");
}
