//! What a connection runs over: a socket of the machine, TCP, or TLS over TCP.
//!
//! Apart from the session, because certificates and sockets have nothing to do with queries. How strict
//! TLS is stands in [`Tls`]; nothing here decides it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme, StreamOwned};
use sha2::Digest;
use stillpoint_core::error::{Error, IoContext, Kind, Result};

use super::config::Tls;

/// A connected stream.
pub(super) enum Stream {
    Unix(UnixStream),
    Plain(TcpStream),
    Encrypted(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    /// How long one call of `read` or `write` waits at most before it says `WouldBlock`.
    pub(super) fn set_patience(&self, patience: Duration) -> std::io::Result<()> {
        match self {
            Self::Unix(socket) => {
                socket.set_read_timeout(Some(patience))?;
                socket.set_write_timeout(Some(patience))
            }
            Self::Plain(socket) => {
                socket.set_read_timeout(Some(patience))?;
                socket.set_write_timeout(Some(patience))
            }
            Self::Encrypted(stream) => {
                stream.sock.set_read_timeout(Some(patience))?;
                stream.sock.set_write_timeout(Some(patience))
            }
        }
    }

    /// Whether a password may go over it as it is.
    pub(super) fn is_private(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }

    /// The hash of the server's certificate that a login is bound to (RFC 5929, tls-server-end-point);
    /// `None` without TLS, or with a signature for which the RFC names no hash.
    pub(super) fn channel_binding(&self) -> Option<Vec<u8>> {
        let Self::Encrypted(stream) = self else { return None };
        end_point(stream.conn.peer_certificates()?.first()?)
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(socket) => socket.read(buffer),
            Self::Plain(socket) => socket.read(buffer),
            Self::Encrypted(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(socket) => socket.write(buffer),
            Self::Plain(socket) => socket.write(buffer),
            Self::Encrypted(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Unix(socket) => socket.flush(),
            Self::Plain(socket) => socket.flush(),
            Self::Encrypted(stream) => stream.flush(),
        }
    }
}

/// What a client checks of a server's certificate; `None` where TLS is not wanted.
pub(super) fn client_config(tls: Tls, ca_file: Option<&Path>) -> Result<Option<Arc<ClientConfig>>> {
    if tls == Tls::Disable {
        return Ok(None);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let wrong = |error: rustls::Error| Error::new(Kind::Config, "TLS cannot be set up").source(error);
    let builder =
        ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().map_err(wrong)?;
    let config = match (tls, ca_file) {
        (Tls::VerifyFull, Some(path)) => {
            let mut roots = RootCertStore::empty();
            let text = std::fs::read(path).or_io(|| format!("cannot read `caFile` {}", path.display()))?;
            for certificate in CertificateDer::pem_slice_iter(&text) {
                let bad = || Error::new(Kind::Config, format!("{} holds no certificates in PEM", path.display()));
                let certificate = certificate.map_err(|error| bad().source(error))?;
                roots.add(certificate).map_err(|error| bad().source(error))?;
            }
            builder.with_root_certificates(roots).with_no_client_auth()
        }
        (Tls::VerifyFull, None) => {
            let verifier = rustls_platform_verifier::Verifier::new(provider).map_err(wrong)?;
            builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth()
        }
        _ => builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer(provider))).with_no_client_auth(),
    };
    Ok(Some(Arc::new(config)))
}

/// Shakes hands over a connected socket.
pub(super) fn encrypt(socket: TcpStream, host: &str, config: Arc<ClientConfig>) -> Result<Stream> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|error| Error::new(Kind::Config, format!("`{host}` is no host name for TLS")).source(error))?;
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::new(Kind::Unauthenticated, format!("no TLS with {host}"))
            .hint("name the certificate authority in `caFile`, or see `tls` in the driver's README")
            .source(error)
    };
    let connection = ClientConnection::new(config, name).map_err(|error| failed(error.into()))?;
    let mut stream = StreamOwned::new(connection, socket);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock).map_err(|error| failed(error.into()))?;
    }
    Ok(Stream::Encrypted(Box::new(stream)))
}

/// Takes whatever certificate comes, as `require` and `prefer` mean it: the line is encrypted, the
/// server is not proven. The handshake's own signature is still checked.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The certificate's hash, by the hash function of its signature; MD5 and SHA-1 become SHA-256.
fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let (0x30, outer, _) = element(certificate)? else { return None };
    let (0x30, _, rest) = element(outer)? else { return None };
    let (0x30, algorithm, _) = element(rest)? else { return None };
    let (0x06, name, _) = element(algorithm)? else { return None };
    // OIDs: 1.2.840.113549.1.1.n (RSA) and 1.2.840.10045.4.n (ECDSA).
    let rsa: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
    let ecdsa: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04];
    let end = name.strip_prefix(rsa).or_else(|| name.strip_prefix(ecdsa))?;
    match end {
        [0x04 | 0x05 | 0x0b] | [0x01] | [0x03, 0x02] => Some(sha2::Sha256::digest(certificate).to_vec()),
        [0x0c] | [0x03, 0x03] => Some(sha2::Sha384::digest(certificate).to_vec()),
        [0x0d] | [0x03, 0x04] => Some(sha2::Sha512::digest(certificate).to_vec()),
        _ => None,
    }
}

/// Tag, content and rest of the DER element at the begin of `bytes`.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = bytes.split_first_chunk::<2>()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let count = usize::from(first & 0x7f);
        let (digits, rest) = rest.split_at_checked(count)?;
        if count > 4 {
            return None;
        }
        (digits.iter().fold(0, |length, &digit| length << 8 | usize::from(digit)), rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_a_certificate_follows_its_signature_and_garbage_has_none() {
        let sequence = |content: Vec<u8>| {
            let mut element = vec![0x30, content.len() as u8];
            element.extend(content);
            element
        };
        let certificate = |end: &[u8]| {
            let mut name = vec![0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
            name.extend(end);
            let mut oid = vec![0x06, name.len() as u8];
            oid.extend(name);
            sequence([sequence(vec![2, 1, 5]), sequence(oid), vec![3, 1, 0]].concat())
        };
        assert_eq!(end_point(&certificate(&[0x0b])).unwrap().len(), 32);
        assert_eq!(end_point(&certificate(&[0x0c])).unwrap().len(), 48);
        assert_eq!(end_point(&certificate(&[0x0d])).unwrap().len(), 64);
        assert_eq!(end_point(&certificate(&[0x0a])), None);
        for cut in 0..certificate(&[0x0b]).len() {
            assert_eq!(end_point(&certificate(&[0x0b])[..cut]), None);
        }
    }
}
