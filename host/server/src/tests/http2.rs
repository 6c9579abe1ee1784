//! HTTP/2 from clients: what bounds streams, and what becomes of those that are misused.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::http::{Request, Response, StatusCode};
use bytes::Bytes;
use h2::RecvStream;
use h2::client::{Builder, ResponseFuture, SendRequest};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::fakes::Rig;
use crate::{Listeners, ServerConfig, serve};

/// The reason of RFC 9113 for a client that does too much.
const ENHANCE_YOUR_CALM: u32 = 0xb;

/// A host that serves, and what stops it.
pub(super) struct Served {
    pub(super) data: SocketAddr,
    admin: SocketAddr,
    pub(super) stop: oneshot::Sender<()>,
    pub(super) serving: JoinSet<()>,
}

/// A connection, and its end.
pub(super) struct Connected {
    requests: SendRequest<Bytes>,
    ended: JoinSet<Result<(), h2::Error>>,
}

pub(super) async fn served(config: ServerConfig) -> Served {
    let rig = Rig::with(config);
    let bind = async || tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let listeners = Listeners { data: bind().await.into(), admin: bind().await.into() };
    let at = |listener: &crate::Plane| listener.socket.local_addr().expect("bound");
    let (data, admin) = (at(&listeners.data), at(&listeners.admin));
    let (stop, stopped) = oneshot::channel::<()>();
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let state = Arc::clone(&rig.state);
        serve(listeners, state, async { drop(stopped.await) }).await.expect("it stops");
    });
    Served { data, admin, stop, serving }
}

pub(super) async fn connect(at: SocketAddr, builder: &Builder) -> Connected {
    let stream = TcpStream::connect(at).await.expect("it listens");
    let (requests, connection) = builder.handshake(stream).await.expect("HTTP/2");
    let mut ended = JoinSet::new();
    ended.spawn(connection);
    Connected { requests: requests.ready().await.expect("a connection"), ended }
}

/// All of an answer.
async fn read(answer: Response<RecvStream>) -> Vec<u8> {
    let (mut body, mut all) = (answer.into_body(), Vec::new());
    while let Some(piece) = body.data().await {
        let piece = piece.expect("all of it");
        body.flow_control().release_capacity(piece.len()).expect("what has come");
        all.extend_from_slice(&piece);
    }
    all
}

/// The bytes of a client that opens streams and resets each at once.
fn reset_at_once(n_streams: u32) -> Vec<u8> {
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    };
    // GET / of http://x, in places of the static table and one literal; then CANCEL.
    let pair = |stream| [frame(1, 0x5, stream, b"\x82\x84\x86\x01\x01x"), frame(3, 0, stream, &[0, 0, 0, 8])].concat();
    let begin = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, b"")].concat();
    begin.into_iter().chain((0..n_streams).flat_map(|n| pair(2 * n + 1))).collect()
}

/// With what reason a server ends the connection of a client that sends this; none where it says none.
async fn goodbye_of(at: SocketAddr, sent: &[u8]) -> Option<u32> {
    let mut stream = TcpStream::connect(at).await.expect("it listens");
    stream.write_all(sent).await.expect("it reads");
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).await.expect("an end");
    let mut frames = &heard[..];
    while let Some((head, rest)) = frames.split_at_checked(9) {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        // GOAWAY: the last stream, and the reason.
        if head[3] == 7 {
            return rest.get(4..8).map(|reason| u32::from_be_bytes(reason.try_into().expect("four")));
        }
        frames = &rest[length..];
    }
    None
}

impl Connected {
    pub(super) fn get(&mut self, url: &str) -> ResponseFuture {
        let request = Request::get(url).body(()).expect("a request");
        self.requests.send_request(request, true).expect("a stream").0
    }

    /// A request whose body does not come.
    fn begin(&mut self) -> (ResponseFuture, h2::SendStream<Bytes>) {
        let request = Request::post("http://x/v1/completions").header("content-type", "application/json");
        self.requests.send_request(request.body(()).expect("a request"), false).expect("a stream")
    }

    /// As many requests at once as that find places, as soon as what came before has given them back.
    pub(super) async fn finds_places(&mut self, n_places: usize) {
        for _ in 0..1_000 {
            let again: Vec<_> = std::iter::repeat_with(|| self.begin()).take(n_places).collect();
            let mut n_let_in = 0;
            for (answer, mut body) in again {
                body.send_data(Bytes::from_static(b"no JSON"), true).expect("a stream");
                n_let_in += usize::from(answer.await.expect("an answer").status() == StatusCode::BAD_REQUEST);
            }
            if n_let_in == n_places {
                return;
            }
        }
        panic!("the places are not given back");
    }

    async fn end(mut self) -> Result<(), h2::Error> {
        drop(self.requests);
        self.ended.join_next().await.expect("one").expect("no panic")
    }
}

#[tokio::test]
async fn each_request_under_way_takes_a_place_of_the_listener() {
    let Served { data, serving: _serving, stop: _stop, .. } =
        served(ServerConfig { max_connections: 3, ..ServerConfig::default() }).await;
    let mut client = connect(data, &Builder::new()).await;
    // The connection's own place, and the two others.
    let held = [(); 3].map(|()| client.begin());
    let (refused, _body) = client.begin();
    let refused = refused.await.expect("an answer");
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let id = refused.headers().get("x-request-id").expect("an id as every answer has");
    assert!(id.to_str().expect("ASCII").starts_with("cmpl-"), "{id:?}");
    let error: Value = serde_json::from_slice(&read(refused).await).expect("JSON");
    assert_eq!(error["error"]["code"], "saturated");
    let refused = client.get("http://x/v1/messages").await.expect("an answer");
    assert_eq!(refused.headers()["request-id"], refused.headers()["x-request-id"]);
    let error: Value = serde_json::from_slice(&read(refused).await).expect("JSON");
    assert_eq!(error["type"], "error", "in Anthropic's words: {error}");
    for (answer, mut body) in held {
        body.send_data(Bytes::from_static(b"no JSON"), true).expect("a stream");
        assert_eq!(answer.await.expect("an answer").status(), StatusCode::BAD_REQUEST, "it was let in");
    }
    // As many as before, whichever ended first.
    client.finds_places(3).await;
}

#[tokio::test]
async fn who_opens_streams_to_reset_them_loses_the_connection_and_takes_nothing() {
    let Served { data, serving: _serving, stop: _stop, .. } =
        served(ServerConfig { max_connections: 130, ..ServerConfig::default() }).await;
    let mut other = connect(data, &Builder::new()).await;
    for _ in 0..10 {
        // Before anybody has looked at them.
        assert_eq!(goodbye_of(data, &reset_at_once(100)).await, Some(ENHANCE_YOUR_CALM));
        assert_eq!(other.get("http://x/health").await.expect("an answer").status(), StatusCode::OK);
    }
    // After their handlers have begun, which the answer to a later one shows.
    let mut client = connect(data, &Builder::new()).await;
    let (under_way, mut rest) = client.begin();
    let mut n_rounds = 0;
    let ended = loop {
        assert!(n_rounds < 1_000, "the connection goes on");
        n_rounds += 1;
        let Ok(mut requests) = client.requests.clone().ready().await else { break n_rounds };
        let mut open = |url| {
            let request = Request::post(url).header("content-type", "application/json").body(()).expect("a request");
            requests.send_request(request, false)
        };
        let held: Vec<_> = std::iter::repeat_with(|| open("http://x/v1/completions")).take(100).collect();
        let Ok((seen, _)) = open("http://x/health") else { break n_rounds };
        if seen.await.is_err() {
            break n_rounds;
        }
        for (_answer, mut body) in held.into_iter().flatten() {
            body.send_reset(h2::Reason::CANCEL);
        }
    };
    assert!(ended > 2, "some may be given up: {ended}");
    // It may open no more, and what was under way ends as it would have.
    rest.send_data(Bytes::from_static(b"no JSON"), true).expect("a stream");
    assert_eq!(under_way.await.expect("an answer").status(), StatusCode::BAD_REQUEST);
    // The other one may have given its place to all these streams.
    drop(other);
    let mut other = connect(data, &Builder::new()).await;
    assert_eq!(other.get("http://x/health").await.expect("an answer").status(), StatusCode::OK);
    other.finds_places(128).await;
}

#[tokio::test]
async fn who_takes_nothing_loses_the_stream_and_not_the_connection() {
    let Served { data, serving: _serving, stop: _stop, .. } =
        served(ServerConfig { write_timeout_ms: 50, ..ServerConfig::default() }).await;
    // The second is an answer of 15 bytes.
    let long = [0, 1, 1_000, 20_000].map(|window| (window, "http://x/openapi.json"));
    let short = [0, 1, 13, 14].map(|window| (window, "http://x/health"));
    for (window, url) in long.into_iter().chain(short) {
        let mut client = connect(data, Builder::new().initial_window_size(window)).await;
        let answer = client.get(url).await.expect("a head");
        let mut body = answer.into_body();
        let error = loop {
            // What is taken is not given back as room for more.
            match body.data().await.expect("no end") {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        let expect = (true, true, Some(h2::Reason::CANCEL));
        assert_eq!((error.is_reset(), error.is_remote(), error.reason()), expect, "{window} of {url}");
        // A head needs no room.
        assert_eq!(client.get("http://x/health").await.expect("a head").status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn who_reads_gets_all_of_it_and_who_asks_nothing_loses_the_connection() {
    let Served { data, serving: _serving, stop: _stop, .. } =
        served(ServerConfig { header_timeout_ms: 500, ..ServerConfig::default() }).await;
    let mut client = connect(data, &Builder::new()).await;
    let answer = client.get("http://x/openapi.json").await.expect("a head");
    let length: usize = answer.headers()["content-length"].to_str().expect("digits").parse().expect("a number");
    let read = read(answer).await.len();
    assert!(read == length && length > 100_000, "{read} of {length}");
    assert!(client.ended.join_next().await.expect("one").expect("no panic").is_ok(), "a goodbye, and no reset");
}

#[tokio::test]
async fn a_host_that_stops_lets_streams_end() {
    let Served { data, stop, mut serving, .. } = served(ServerConfig::default()).await;
    let mut client = connect(data, &Builder::new()).await;
    let (answer, mut body) = client.begin();
    assert_eq!(client.get("http://x/health").await.expect("an answer").status(), StatusCode::OK, "it is in");
    stop.send(()).expect("it serves");
    // What comes next is sent elsewhere.
    let refused = loop {
        match client.requests.clone().ready().await {
            Err(error) => break error,
            Ok(mut requests) => {
                let request = Request::get("http://x/health").body(()).expect("a request");
                let asked = requests.send_request(request, true).map(|(answer, _)| answer);
                if let Ok(answer) = asked {
                    drop(answer.await);
                }
            }
        }
    };
    assert_eq!((refused.is_go_away(), refused.reason()), (true, Some(h2::Reason::NO_ERROR)));
    body.send_data(Bytes::from_static(b"no JSON"), true).expect("a stream");
    assert_eq!(answer.await.expect("an answer").status(), StatusCode::BAD_REQUEST);
    assert!(client.end().await.is_ok());
    serving.join_next().await.expect("one").expect("it stops");
}

#[tokio::test]
async fn the_admin_plane_answers_to_loopback_names_only() {
    let Served { admin, serving: _serving, stop: _stop, .. } = served(ServerConfig::default()).await;
    let mut client = connect(admin, &Builder::new()).await;
    for (name, expect) in [("localhost", StatusCode::OK), ("evil.example", StatusCode::FORBIDDEN)] {
        let answer = client.get(&format!("http://{name}:{}/admin/v1/requests", admin.port())).await;
        assert_eq!(answer.expect("an answer").status(), expect, "{name}");
    }
}
