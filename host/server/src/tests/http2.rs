//! HTTP/2 from clients: what bounds streams, and what becomes of those that are misused.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::http::{Request, StatusCode};
use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::fakes::Rig;
use crate::{Listeners, ServerConfig, serve};

/// A host that serves, and what stops it.
struct Served {
    data: SocketAddr,
    admin: SocketAddr,
    stop: oneshot::Sender<()>,
    serving: JoinSet<()>,
}

/// A connection, and its end.
struct Connected {
    requests: SendRequest<Bytes>,
    ended: JoinSet<Result<(), h2::Error>>,
}

async fn served(config: ServerConfig) -> Served {
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

async fn connect(at: SocketAddr, builder: &Builder) -> Connected {
    let stream = TcpStream::connect(at).await.expect("it listens");
    let (requests, connection) = builder.handshake(stream).await.expect("HTTP/2");
    let mut ended = JoinSet::new();
    ended.spawn(connection);
    Connected { requests: requests.ready().await.expect("a connection"), ended }
}

impl Connected {
    fn get(&mut self, url: &str) -> ResponseFuture {
        let request = Request::get(url).body(()).expect("a request");
        self.requests.send_request(request, true).expect("a stream").0
    }

    /// A request whose body does not come.
    fn begin(&mut self) -> (ResponseFuture, h2::SendStream<Bytes>) {
        let request = Request::post("http://x/v1/completions").header("content-type", "application/json");
        self.requests.send_request(request.body(()).expect("a request"), false).expect("a stream")
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
    assert_eq!(refused.await.expect("an answer").status(), StatusCode::TOO_MANY_REQUESTS);
    for (answer, mut body) in held {
        body.send_data(Bytes::from_static(b"no JSON"), true).expect("a stream");
        assert_eq!(answer.await.expect("an answer").status(), StatusCode::BAD_REQUEST, "it was let in");
    }
    // Places are free once answers have been sent: as many as before, whichever ended first.
    for _ in 0..1_000 {
        let again = [(); 3].map(|()| client.begin());
        let mut statuses = Vec::new();
        for (answer, mut body) in again {
            body.send_data(Bytes::from_static(b"no JSON"), true).expect("a stream");
            statuses.push(answer.await.expect("an answer").status());
        }
        if statuses == [StatusCode::BAD_REQUEST; 3] {
            return;
        }
    }
    panic!("the places are not given back");
}

#[tokio::test]
async fn who_takes_nothing_loses_the_stream_and_not_the_connection() {
    let Served { data, serving: _serving, stop: _stop, .. } =
        served(ServerConfig { write_timeout_ms: 50, ..ServerConfig::default() }).await;
    for window in [0, 1, 1_000, 20_000] {
        let mut client = connect(data, Builder::new().initial_window_size(window)).await;
        let answer = client.get("http://x/openapi.json").await.expect("a head");
        let mut body = answer.into_body();
        let error = loop {
            // What is taken is not given back as room for more.
            match body.data().await.expect("no end") {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        let expect = (true, true, Some(h2::Reason::CANCEL));
        assert_eq!((error.is_reset(), error.is_remote(), error.reason()), expect, "{window}");
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
    let (mut body, mut read) = (answer.into_body(), 0);
    while let Some(piece) = body.data().await {
        let piece = piece.expect("all of it");
        body.flow_control().release_capacity(piece.len()).expect("what has come");
        read += piece.len();
    }
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
